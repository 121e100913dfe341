"""HTTP/1.1 and server-sent events by hand, for campaigns that ask more at once, or worse, than a library would."""

import asyncio, json

# Bytes of a line, at most; an answer of the server that has a longer one is none.
LINE_MAX = 1 << 24


class Broken(Exception):
    """The connection ended where an answer, or more of it, was due."""


class Reply:
    """What came back."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The data of a stream's events."""
        lines = self.body.split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def head(method, path, key=None, more=()):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *([f"Authorization: Bearer {key}"] if key else []), *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def post(path, body, key=None, more=()):
    """The bytes of a request with a body of JSON, or of bytes that are sent as they are."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head("POST", path, key, ["Content-Type: application/json", f"Content-Length: {len(body)}", *more]) + body


async def read_head(reader):
    """Status and headers of an answer."""
    line = await reader.readline()
    if not line.startswith(b"HTTP/1.1 "):
        raise Broken(f"no answer: {line[:80]!r}")
    headers = {}
    while (field := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = field.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(line.split()[1]), headers


async def read_reply(reader):
    """A whole answer."""
    status, headers = await read_head(reader)
    try:
        if "chunked" in headers.get("transfer-encoding", ""):
            parts = []
            while (size := int(await reader.readline(), 16)) > 0:
                parts.append(await reader.readexactly(size))
                await reader.readexactly(2)
            await reader.readexactly(2)
            return Reply(status, headers, b"".join(parts))
        return Reply(status, headers, await reader.readexactly(int(headers.get("content-length", 0))))
    except (asyncio.IncompleteReadError, ValueError) as error:
        raise Broken(f"an answer of status {status} broke off: {error}") from None


async def connect(address):
    return await asyncio.open_connection(*address, limit=LINE_MAX)


async def ask(address, request, seconds=120):
    """Sends bytes over a connection of their own and reads the answer, which may come before all is sent."""
    async def talk():
        reader, writer = await connect(address)
        sending = asyncio.ensure_future(send(writer, request))
        try:
            return await read_reply(reader)
        except ConnectionError as error:
            raise Broken(repr(error)) from None
        finally:
            sending.cancel()
            writer.close()

    return await asyncio.wait_for(talk(), seconds)


async def send(writer, request):
    """Bytes, or parts of them one after the other; a server that has said enough may close meanwhile."""
    try:
        for part in [request] if isinstance(request, bytes) else request:
            writer.write(part)
            await writer.drain()
    except ConnectionError:
        pass


class Pool:
    """Connections that are used again, so many at most."""

    def __init__(self, address, most):
        self.address, self.places, self.idle = address, asyncio.Semaphore(most), []

    async def ask(self, request, seconds):
        async with self.places:
            kept = None
            while self.idle and kept is None:
                kept = self.idle.pop()
                if kept[0].at_eof():
                    kept[1].close()
                    kept = None
            reader, writer = kept or await connect(self.address)
            try:
                writer.write(request)
                reply = await asyncio.wait_for(read_reply(reader), seconds)
            except BaseException:
                writer.close()
                raise
            if reply.headers.get("connection", "") == "close":
                writer.close()
            else:
                self.idle.append((reader, writer))
            return reply

    def close(self):
        for _, writer in self.idle:
            writer.close()
        self.idle.clear()
