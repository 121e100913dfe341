#!/usr/bin/env python3
"""Asks the HTTP API for far more than it admits, and as clients do that leave, do not read, or send nonsense.

    python3 tests/campaigns/flood.py --requests 10000 --picture flood.svg

A coordinator with two keys and --workers workers. In each of --rounds rounds, --requests requests come at --pace a
second
  · with a key whose tokens per minute admit a hundredth of them (--over), and
  · with a key without limits, for answers of --long tokens, so that what the process itself admits is full.
Every answer must be whole (and the one that the same request has alone), or a 429 or 503 with Retry-After. Then come,
--hostile-rounds times, 1,000 clients that vanish mid-stream, readers that are slow or read nothing, connections that
say nothing, bodies of 10 MB, arrays of a million values, deep JSON, and every number at its extremes. All the while
/health is asked, and memory sampled (VmRSS, and the part of it that is no mapped file), of which a picture is drawn.

Needs Python only. Prints tables and a line of JSON; exit code 1 if an answer was neither, changed or missing, a
process panicked or ended, memory grew by more than --growth MiB from the first flood's end to the last's or is more
than --ceiling MiB after nonsense, or jobs are left when all is over.
"""

import argparse, asyncio, collections, json, os, random, re, socket, statistics, struct, sys, threading, time, urllib.parse

import cluster as clusters, picture, wire

SEEDS = 8
CONNECTIONS = 1000
# Seconds that /health may take in the worst of it: idle connections are closed after 60.
HEALTH_MAX = 90
PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/batches"]


class Samples(threading.Thread):
    """Resident and anonymous MiB of each process, over time."""

    def __init__(self, processes):
        super().__init__(daemon=True)
        self.processes, self.began, self.over = processes, time.time(), False
        self.taken = {name: [] for name in processes}
        self.phases = []

    def run(self):
        while not self.over:
            at = time.time() - self.began
            for name, process in self.processes.items():
                try:
                    self.taken[name].append((at, *memory(process)))
                except (OSError, KeyError):
                    pass
            time.sleep(0.25)

    def phase(self, name):
        self.phases.append((time.time() - self.began, name))
        print(f"{time.time() - self.began:6.0f} s  {name}", file=sys.stderr, flush=True)

    def anonymous(self, name, since, until):
        """The median between two times."""
        return statistics.median([anon for at, _, anon in self.taken[name] if since <= at <= until] or [0])


def memory(process):
    fields = dict(line.split(":", 1) for line in open(f"/proc/{process.pid}/status"))
    return [int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon")]


class Campaign:
    def __init__(self, options):
        self.options, self.cluster = options, clusters.Cluster(options)
        self.dice, self.broken = random.Random(options.seed), []
        self.figures, self.health, self.kinds = {}, {}, collections.Counter()

    def wrong(self, what):
        """A guarantee that was not kept."""
        kind = re.split("[:=]", what)[0]
        self.kinds[kind] += 1
        # The rest of them would say the same.
        if self.kinds[kind] <= 3:
            self.broken.append(what)

    async def run(self):
        cluster, options = self.cluster, self.options
        if not await asyncio.to_thread(cluster.ready, 120):
            sys.exit(f"the cluster does not become ready; see {cluster.state}/log")
        # Tokens per minute such that a hundredth of what comes has room: a request has so many.
        size = options.tokens + 3
        per_minute = int(options.pace / options.over * size * 60)
        self.keys = {"rate": cluster.key("rate", "--tokens-per-minute", per_minute), "free": cluster.key("free")}
        self.pids = {name: process.pid for name, process in cluster.processes().items()}
        self.samples = Samples(cluster.processes())
        self.samples.start()
        self.samples.phase("alone")
        lengths = {"rate": options.tokens, "free": options.long}
        self.alones = {kind: [await self.alone(seed, length) for seed in range(SEEDS)]
                       for kind, length in lengths.items()}
        self.expected = self.alones["rate"]
        watching = asyncio.ensure_future(self.watch_health())
        self.settled = []
        for number in range(options.rounds):
            for kind in self.keys:
                self.samples.phase(f"{kind} {number + 1}")
                await self.flood(f"{kind} {number + 1}", kind, lengths[kind])
            await self.rest()
        for number in range(options.hostile_rounds if options.hostile else 0):
            for kind in options.hostile.split(","):
                self.samples.phase(kind)
                began = time.time()
                self.figures[kind] = await getattr(self, kind.replace("-", "_"))()
                self.figures[kind]["seconds"] = round(time.time() - began)
                await self.serves_as_before(kind)
            await self.rest()
        watching.cancel()
        self.samples.over = True

    # What is asked.

    def body(self, seed, **more):
        return {"prompt": "ls - list", "max_tokens": self.options.tokens, "temperature": 0.8, "seed": seed,
                "ignore_eos": True, **more}

    async def ask(self, body, key="free", path=PATHS[0], seconds=120):
        return await wire.ask(self.cluster.http, wire.post(path, body, self.keys[key]), seconds)

    async def alone(self, seed, length):
        reply = await self.ask(self.body(seed, max_tokens=length))
        if reply.status != 200:
            sys.exit(f"an undisturbed request is refused: {reply.status} {reply.body[:300]!r}")
        return reply.json()["choices"][0]["text"]

    async def serves_as_before(self, after):
        """It answers as it did, within a while in which what is left of others may be in its way."""
        for _ in range(60):
            try:
                reply = await self.ask(self.body(0))
            except (wire.Broken, OSError, TimeoutError) as error:
                self.wrong(f"after {after} no answer: {error!r}")
                return
            if reply.status == 200:
                if reply.json()["choices"][0]["text"] != self.expected[0]:
                    self.wrong(f"after {after} an answer has changed")
                return
            await asyncio.sleep(1)
        self.wrong(f"after {after} nothing is admitted for a minute: {reply.status} {reply.body[:200]!r}")

    async def watch_health(self):
        while True:
            began = time.time()
            try:
                reply = await wire.ask(self.cluster.http, wire.head("GET", "/health"), HEALTH_MAX)
                if reply.status != 200:
                    self.wrong(f"/health says {reply.status}")
            except (wire.Broken, OSError, TimeoutError) as error:
                self.wrong(f"/health: {error!r}")
            phase = self.samples.phases[-1][1]
            self.health[phase] = max(self.health.get(phase, 0), round(time.time() - began, 2))
            await asyncio.sleep(0.5)

    async def metrics(self):
        reply = await wire.ask(self.cluster.http, wire.head("GET", "/metrics", self.keys["free"]), 30)
        lines = (line.rsplit(" ", 1) for line in reply.body.decode().splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    async def rest(self):
        """Until nothing runs or waits; then memory has a while to come to rest."""
        names = ["num_requests_running", "num_requests_waiting", "jobs_running"]
        for _ in range(240):
            left = {name: (await self.metrics())["lite_llm_" + name] for name in names}
            if not any(left.values()):
                break
            await asyncio.sleep(0.5)
        else:
            self.wrong(f"two minutes after all is over there are {left}")
        self.samples.phase("rest")
        await asyncio.sleep(self.options.rest)
        now = time.time() - self.samples.began
        self.settled.append({name: round(self.samples.anonymous(name, now - self.options.rest / 2, now), 1)
                             for name in self.pids})

    # Far more than is admitted.

    async def flood(self, name, kind, length):
        options, key, expected = self.options, self.keys[kind], self.alones[kind]
        if kind == "rate":
            await self.drain(key)
        pool, seen = wire.Pool(self.cluster.http, CONNECTIONS), collections.Counter()
        before, began = await self.metrics(), time.time()

        async def one(number):
            seed, stream = number % SEEDS, number % 2 == 0
            body = self.body(seed, stream=stream, max_tokens=length)
            if stream:
                body["stream_options"] = {"include_usage": True}
            try:
                reply = await pool.ask(wire.post(PATHS[0], body, key), 900)
            except (wire.Broken, OSError, TimeoutError) as error:
                seen["broken"] += 1
                return self.wrong(f"{name}: {error!r}")
            seen[reply.status] += 1
            if reply.status == 200:
                text, whole = text_of(reply, stream)
                if not whole:
                    self.wrong(f"{name}: an answer that was admitted is not whole: {reply.body[-200:]!r}")
                elif text != expected[seed]:
                    self.wrong(f"{name}: the answer to seed {seed} has changed")
            elif reply.status not in (429, 503):
                self.wrong(f"{name}: {reply.status} {reply.body[:200]!r}")
            elif not reply.headers.get("retry-after", "").isdigit():
                self.wrong(f"{name}: {reply.status} without Retry-After")

        tasks = []
        for number in range(options.requests):
            due = began + number / options.pace
            if (wait := due - time.time()) > 0:
                await asyncio.sleep(wait)
            elif number % 50 == 0:
                # So that answers are read, too.
                await asyncio.sleep(0)
            tasks.append(asyncio.ensure_future(one(number)))
        offered = time.time() - began
        await asyncio.gather(*tasks)
        took = time.time() - began
        pool.close()
        after = await self.metrics()
        admitted = seen[200]
        self.figures[name] = {
            "offered_per_s": round(options.requests / offered), "admitted_per_s": round(admitted / took, 1),
            "over": round(options.requests / offered / max(admitted / took, 1e-9)),
            "answers": {str(code): count for code, count in sorted(seen.items(), key=str)},
            "refusals_per_s": round((options.requests - admitted) / offered),
            "seconds": round(took), "tokens_per_s": round(
                (after["lite_llm_generation_tokens_total"] - before["lite_llm_generation_tokens_total"]) / took)}
        if not admitted:
            self.wrong(f"{name}: nothing was admitted")

    async def drain(self, key):
        """Uses up what a key saved while it was idle."""
        for _ in range(2000):
            request = wire.post(PATHS[0], self.body(0, n=8), key)
            if (await wire.ask(self.cluster.http, request)).status == 429:
                return
        self.wrong("a key's tokens per minute have no end")

    # Clients that leave, or do not read.

    async def vanish(self):
        """1,000 clients that leave when their answer has begun, half of them without a word."""
        places, seen = asyncio.Semaphore(100), collections.Counter()

        async def one(number):
            async with places:
                for _ in range(300):
                    reader, writer = await wire.connect(self.cluster.http)
                    body = self.body(number, max_tokens=900, stream=True)
                    writer.write(wire.post(PATHS[number % 2], chat(body) if number % 2 else body, self.keys["free"]))
                    status, _ = await wire.read_head(reader)
                    if status != 429:
                        break
                    writer.close()
                    seen["come again"] += 1
                    await asyncio.sleep(0.1 + self.dice.random() / 5)
                if status != 200:
                    seen[f"status {status}"] += 1
                    return self.wrong(f"vanish: {status}")
                await reader.readuntil(b"data:")
                await asyncio.sleep(self.dice.random() / 10)
                if number // 2 % 2:
                    # A reset instead of a farewell.
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.close()
                seen["vanished"] += 1

        ended = await asyncio.gather(*map(one, range(self.options.vanish)), return_exceptions=True)
        for error in filter(None, ended):
            self.wrong(f"vanish: {error!r}")
        began = time.time()
        for _ in range(100):
            if (await self.metrics())["lite_llm_jobs_running"] == 0:
                break
            await asyncio.sleep(0.1)
        else:
            self.wrong("vanish: ten seconds after the clients left, jobs run")
        seen["seconds until nothing runs"] = round(time.time() - began, 1)
        return dict(seen)

    async def slow_readers(self):
        """50 that read nothing and 50 that read a few bytes at a time, while others are served."""
        opened, seen = [], collections.Counter()
        body = self.body(1, max_tokens=900, stream=True, logprobs=20)
        for number in range(100):
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.setblocking(False)
            await asyncio.get_running_loop().sock_connect(plain, self.cluster.http)
            await asyncio.get_running_loop().sock_sendall(plain, wire.post(PATHS[0], body, self.keys["free"]))
            opened.append(plain)
        waits = []

        async def sip(plain):
            """A few bytes at a time, until the end or until told to stop."""
            for _ in range(400):
                data = await asyncio.get_running_loop().sock_recv(plain, 256)
                if not data:
                    return
                await asyncio.sleep(0.1)

        sips = [asyncio.ensure_future(sip(plain)) for plain in opened[50:]]
        for _ in range(40):
            began = time.time()
            reply = await self.ask(self.body(0))
            waits.append(time.time() - began)
            seen[f"others got {reply.status}"] += 1
            if reply.status == 200 and reply.json()["choices"][0]["text"] != self.expected[0]:
                self.wrong("slow-readers: somebody else's answer has changed")
            await asyncio.sleep(1)
        if not seen["others got 200"]:
            self.wrong("slow-readers: nobody else was served")
        for of in sips:
            of.cancel()
        await asyncio.gather(*sips, return_exceptions=True)
        # Those that read nothing were given up by now, or all that they asked for waits in sockets.
        seen["running with clients open"] = (await self.metrics())["lite_llm_jobs_running"]
        for plain in opened:
            plain.close()
        return {**seen, "others' seconds": clusters.quantiles(waits)}

    async def idle(self):
        """More connections than are taken at a time, over which nothing is said: how long others wait."""
        opened = await asyncio.gather(*(wire.connect(self.cluster.http) for _ in range(1100)))
        began = time.time()
        try:
            await wire.ask(self.cluster.http, wire.head("GET", "/health"), HEALTH_MAX)
        except (wire.Broken, OSError, TimeoutError) as error:
            self.wrong(f"idle: {error!r}")
        waited = time.time() - began
        for _, writer in opened:
            writer.close()
        return {"seconds until /health answered": round(waited, 1)}

    # Nonsense.

    async def expect(self, name, request, good, seen, seconds=120):
        """An answer with one of these statuses."""
        try:
            reply = await wire.ask(self.cluster.http, request, seconds)
        except (wire.Broken, OSError, TimeoutError) as error:
            seen["broken"] += 1
            return self.wrong(f"{name}: {error!r}")
        seen[str(reply.status)] += 1
        if reply.status not in good:
            self.wrong(f"{name}: {reply.status} {reply.body[:300]!r}")
        elif reply.status >= 400 and not is_error(reply):
            self.wrong(f"{name}: an error in another shape: {reply.body[:200]!r}")
        elif reply.status in (429, 503) and not reply.headers.get("retry-after", "").isdigit():
            self.wrong(f"{name}: {reply.status} without Retry-After")

    async def large_bodies(self):
        """10 MB, said beforehand or in chunks; what just fits, at once; and bodies that never end."""
        seen, key, large = collections.Counter(), self.keys["free"], 10_000_000
        text = json.dumps({"prompt": "a" * (large - 20)}).encode()
        kind = "Content-Type: application/json"
        pieces = [b"%x\r\n" % 65536 + b"a" * 65536 + b"\r\n" for _ in range(large // 65536 + 1)]
        for path in PATHS:
            chunked = [wire.head("POST", path, key, [kind, "Transfer-Encoding: chunked"]), *pieces, b"0\r\n\r\n"]
            claims = wire.head("POST", path, key, [kind, f"Content-Length: {1 << 62}"])
            for name, request in (("said", wire.post(path, text, key)), ("chunked", chunked), ("claims", claims)):
                await self.expect(f"10 MB, {name}, {path}", request, [413], seen)
        # A prompt that just fits is refused by its tokens, and only so many have room at a time.
        fits = wire.post(PATHS[0], {"prompt": "a " * 2_000_000}, key)
        await asyncio.gather(*(self.expect("4 MB", fits, [400, 408, 413, 429], seen) for _ in range(200)))
        stuck = wire.post(PATHS[0], b"{", key)[:-1].replace(b"Content-Length: 1", b"Content-Length: 4000000")
        await asyncio.gather(*(self.expect("stuck", stuck + b"{", [400, 408], seen) for _ in range(100)))
        line = json.dumps({"custom_id": "a", "method": "POST", "url": PATHS[0], "body": {"prompt": "a" * large}})
        await self.file("a line of 10 MB", line.encode(), seen)
        await self.file("70 MiB", b"\n" * (70 << 20), seen)
        return dict(seen)

    async def file(self, name, content, seen):
        """Uploads a file, and if it is taken makes a batch of it: both must be answers, and nothing may be taken."""
        mark = "b0undary"
        body = (f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{mark}\r\n'
                f'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n').encode()
        body += content + f"\r\n--{mark}--\r\n".encode()
        more = [f"Content-Type: multipart/form-data; boundary={mark}", f"Content-Length: {len(body)}"]
        request = wire.head("POST", "/v1/files", self.keys["free"], more) + body
        try:
            reply = await wire.ask(self.cluster.http, request)
        except (wire.Broken, OSError) as error:
            return self.wrong(f"file of {name}: {error!r}")
        seen[str(reply.status)] += 1
        if reply.status != 200:
            if reply.status not in (400, 413, 429):
                self.wrong(f"file of {name}: {reply.status} {reply.body[:200]!r}")
            return
        batch = {"input_file_id": reply.json()["id"], "endpoint": PATHS[0], "completion_window": "24h"}
        await self.expect(f"batch of {name}", wire.post(PATHS[2], batch, self.keys["free"]), [400, 413], seen)

    async def long_arrays(self):
        """A million values wherever there may be more than one."""
        seen, million, key = collections.Counter(), 10**6, self.keys["free"]
        numbers, texts = [1] * million, ["a"] * million
        message, tool = {"role": "user", "content": "a"}, {"type": "function", "function": {"name": "f"}}
        for field, value in {
                "prompt": numbers, "prompt of texts": texts, "prompt of lists": [[1]] * (million // 2),
                "stop": texts, "logit_bias": {str(token): 1 for token in range(million)}, "modalities": texts,
                "metadata": numbers, "model": numbers, "grammar": texts}.items():
            body = {"prompt": "a", "max_tokens": 1, field.split()[0]: value}
            await self.expect(f"10^6 of {field}", wire.post(PATHS[0], body, key), [200, 400, 404, 413], seen)
        schema = {"enum": list(range(200_000))}
        for field, value in {
                "messages": [message] * (million // 3), "content": [{"type": "text", "text": "a"}] * (million // 3),
                "tools": [tool] * (million // 4), "chat_template_kwargs": {"a": numbers},
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}.items():
            body = {"messages": [message], "max_tokens": 1, field: value}
            if field == "content":
                body = {"messages": [{**message, field: value}], "max_tokens": 1}
            await self.expect(f"10^6 of {field}", wire.post(PATHS[1], body, key), [200, 400, 413], seen)
        # A million of these are too many bytes: what just fits is looked at, too.
        for count in (million, million // 8):
            fields = {str(number): 1 for number in range(count)}
            for name, path, body in (
                    ("fields", PATHS[0], fields), ("biases", PATHS[0], {"prompt": "a", "logit_bias": fields}),
                    ("messages", PATHS[1], {"messages": [message] * count}),
                    ("parts", PATHS[1], {"messages": [{**message, "content": [{"type": "text", "text": "a"}] * count}],
                                         "max_tokens": 1}),
                    ("tools", PATHS[1], {"messages": [message], "tools": [tool] * count})):
                await self.expect(f"{count} {name}", wire.post(path, body, key), [200, 400, 413], seen)
        batch = {"input_file_id": "file-1", "endpoint": PATHS[0], "completion_window": "24h"}
        batch["metadata"] = {str(n): "a" for n in range(million)}
        await self.expect("10^6 of metadata", wire.post(PATHS[2], batch, key), [400, 404, 413], seen)
        line = json.dumps({"custom_id": "a", "method": "POST", "url": PATHS[0], "body": {"prompt": numbers}})
        await self.file("a line of 10^6 ids", line.encode(), seen)
        await self.file("10^6 lines", b"{}\n" * million, seen)
        return dict(seen)

    async def deep_json(self):
        """Arrays and objects inside each other, from what is still taken to a million deep."""
        seen, key = collections.Counter(), self.keys["free"]
        nests = {"arrays": ("[", "]"), "objects": ('{"a":', "}"), "mixed": ('[{"a":', "}]")}
        places = {
            PATHS[0]: ['%s', '{"prompt":%s}', '{"prompt":"a","max_tokens":1,"metadata":%s}',
                       '{"prompt":"a","max_tokens":1,"response_format":{"type":"json_schema","json_schema":'
                       '{"name":"a","schema":%s}}}'],
            PATHS[1]: ['{"messages":%s}', '{"messages":[{"role":"user","content":%s}]}',
                       '{"messages":[{"role":"user","content":"a"}],"max_tokens":1,"chat_template_kwargs":{"a":%s}}',
                       '{"messages":[{"role":"user","content":"a"}],"max_tokens":1,"tools":[{"type":"function",'
                       '"function":{"name":"f","parameters":%s}}]}'],
            PATHS[2]: ['{"metadata":%s}']}
        for path, bodies in places.items():
            for body in bodies:
                for name, (left, right) in nests.items():
                    for depth in (10, 30, 60, 64, 65, 128, 1000, 100_000, 1_000_000):
                        for inner in ("1", ""):
                            text = body % (left * depth + inner + right * depth)
                            if len(text) < 8_000_000:
                                request = wire.post(path, text.encode(), key)
                                await self.expect(f"{name} {depth} deep in {body[:60]}", request, [200, 400, 404], seen)
        # What a schema or a grammar may ask for without many bytes.
        schema = {}
        for _ in range(25):
            schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
        for body in [{"prompt": "a", "max_tokens": 1, "regex": "(" * 50_000 + ")" * 50_000},
                     {"prompt": "a", "max_tokens": 1, "regex": "(((a{1000}){1000}){1000}){1000}"},
                     {"prompt": "a", "max_tokens": 1, "grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000},
                     {"prompt": "a", "max_tokens": 1, "grammar": "start: start start | start"}]:
            await self.expect(f"form {str(body)[:80]}", wire.post(PATHS[0], body, key), [200, 400, 429], seen)
        return dict(seen)

    async def numbers(self):
        """Every number of a request at, before and beyond the ends of every type it could have."""
        seen, key = collections.Counter(), self.keys["free"]
        ends = sorted({sign * (2**bits + off) for bits in (0, 7, 8, 15, 16, 31, 32, 53, 63, 64, 65, 127, 128, 1100)
                       for off in (-1, 0, 1) for sign in (-1, 1)})
        texts = [str(end) for end in ends] + [
            "0.0", "-0.0", "0.5", "1.5", "-0.5", "1e-45", "-1e-45", "1e-46", "5e-324", "1e-400", "3.4028235e38",
            "3.4028236e38", "-3.5e38", "1.7976931348623157e308", "1e309", "-1e309", "1e999999999999", "1e-999999999999",
            "NaN", "Infinity", "-Infinity", "1" + "0" * 5000, "0." + "0" * 5000 + "1", "1e5", "2.0", "00", "+1", "1.",
            ".5", "0x10", '"1"', "true", "null", "[]", "{}"]
        whole = ["max_tokens", "n", "logprobs", "top_k", "seed", "priority", "deadline_ms", "best_of"]
        real = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
        places = [(PATHS[0], '{"prompt":"a","max_tokens":%s}' % "%s")]
        places += [(PATHS[0], '{"prompt":"a","max_tokens":2,"%s":%%s}' % field) for field in whole[1:] + real]
        places += [(PATHS[1], '{"messages":[{"role":"user","content":"a"}],"max_completion_tokens":%s}'),
                   (PATHS[1], '{"messages":[{"role":"user","content":"a"}],"max_tokens":2,"logprobs":true,'
                              '"top_logprobs":%s}'),
                   (PATHS[0], '{"prompt":"a","max_tokens":2,"logit_bias":{"5":%s}}'),
                   (PATHS[0], '{"prompt":"a","max_tokens":2,"logit_bias":{"%s":1}}'),
                   (PATHS[0], '{"prompt":[%s],"max_tokens":2}'), (PATHS[0], '{"prompt":[1,%s],"max_tokens":2}'),
                   (PATHS[0], '{"prompt":"a","max_tokens":2,"seed":7,"n":64,"temperature":%s}'),
                   (PATHS[1], '{"messages":[{"role":"user","content":"a"}],"max_tokens":2,"chat_template_kwargs":'
                              '{"a":%s}}'),
                   (PATHS[0], '{"prompt":"a","max_tokens":2,"response_format":{"type":"json_schema","json_schema":'
                              '{"name":"a","schema":{"type":"integer","minimum":%s}}}}'),
                   (PATHS[0], '{"prompt":"a","max_tokens":2,"response_format":{"type":"json_schema","json_schema":'
                              '{"name":"a","schema":{"type":"string","minLength":%s}}}}'),
                   (PATHS[0], '{"prompt":"a","max_tokens":2,"response_format":{"type":"json_schema","json_schema":'
                              '{"name":"a","schema":{"type":"array","minItems":%s}}}}')]
        pool = asyncio.Semaphore(8)

        async def one(path, body, text):
            async with pool:
                # A deadline that has passed is told as the status of a gateway that gave up.
                good = [200, 400, 403, 429] + [504] * ("deadline_ms" in body)
                name = f"{text[:40]} in {body[-70:]}"
                await self.expect(name, wire.post(path, (body % text).encode(), key), good, seen)

        await asyncio.gather(*(one(path, body, text) for path, body in places for text in texts))
        for path in ("/v1/files", "/v1/batches"):
            for text in texts:
                request = wire.head("GET", f"{path}?limit={urllib.parse.quote(text)[:3000]}", key)
                await self.expect(f"limit={text[:40]}", request, [200, 400, 414], seen)
        for text in map(str, ends):
            for path in ("/v1/batches/batch_", "/v1/files/file-", "/v1/files/file-batch-"):
                for tail in ("", "-output", "/content"):
                    await self.expect(path + text, wire.head("GET", path + text + tail, key), [400, 404], seen)
        return dict(seen)

    # What came of it.

    def look_at_processes(self):
        for name, process in self.cluster.processes().items():
            if process.poll() is not None:
                self.wrong(f"{name} ended with {process.returncode}")
        log = open(os.path.join(self.cluster.state, "log"), errors="replace").read()
        for line in re.findall(r".*panicked.*", log)[:5]:
            self.wrong(f"log: {line}")
        self.log_bytes = len(log)

    def look_at_memory(self):
        """Between the ends of floods nothing may grow; what nonsense leaves in the allocator has an end."""
        floods, nonsense = self.settled[:self.options.rounds], self.settled[self.options.rounds:]
        for name in self.pids:
            first, last = floods[0][name], floods[-1][name]
            if last - first > self.options.growth:
                self.wrong(f"memory: {name} grew from {first} to {last} MiB between floods")
            most = max((settled[name] for settled in nonsense), default=0)
            if most > self.options.ceiling:
                self.wrong(f"memory: after nonsense {name} keeps {most} MiB; {self.options.ceiling} are allowed")

    def draw(self):
        lines = {f"{name}, {what}": [(sample[0], sample[of]) for sample in taken]
                 for name, taken in self.samples.taken.items() for of, what in ((2, "anonymous"),)}
        open(self.options.picture, "w").write(
            picture.svg("memory under overload (RssAnon)", "MiB", lines, self.samples.phases))

    def result(self):
        peak = {name: {"RSS": round(max(of[1] for of in taken)), "anonymous": round(max(of[2] for of in taken))}
                for name, taken in self.samples.taken.items()}
        return {"floods": self.figures, "settled_MiB": self.settled, "peak_MiB": peak, "log_bytes": self.log_bytes,
                "health_seconds_at_most": self.health, "broken": self.broken,
                "broken_of_a_kind": self.kinds,
                "picture": self.options.picture, "folder": self.cluster.state}


def is_error(reply):
    """Whether it is an error in OpenAI's shape."""
    try:
        return isinstance(reply.json()["error"]["message"], str)
    except (ValueError, KeyError, TypeError):
        return False


def chat(body):
    """The same of a chat."""
    return {**{name: value for name, value in body.items() if name != "prompt"},
            "messages": [{"role": "user", "content": body["prompt"]}]}


def text_of(reply, stream):
    """The text of a completion, and whether it is whole."""
    if not stream:
        choice = reply.json()["choices"][0]
        return choice["text"], choice["finish_reason"] is not None
    events = reply.events()
    parts = [json.loads(event) for event in events if event != b"[DONE]"]
    choices = [choice for part in parts for choice in part.get("choices", [])]
    text = "".join(choice["text"] for choice in choices)
    return text, events[-1:] == [b"[DONE]"] and any(choice["finish_reason"] for choice in choices)


def table(result):
    line = "{:<8} {:>9} {:>10} {:>6} {:>9} {:>8}  {}"
    print(line.format("flood", "offered/s", "admitted/s", "over", "tokens/s", "seconds", "answers"))
    for name, of in result["floods"].items():
        if "over" in of:
            print(line.format(name, of["offered_per_s"], of["admitted_per_s"], f"{of['over']} x", of["tokens_per_s"],
                              of["seconds"], of["answers"]))
    for name, of in result["floods"].items():
        if "over" not in of:
            print(f"{name:<16}", of)
    print("anonymous MiB at rest after each round, and at the end:", *result["settled_MiB"], sep="\n  ")
    print("/health, seconds at most:", result["health_seconds_at_most"])
    for what in result["broken"][:20]:
        print("BROKEN:", what)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    clusters.arguments(parser, tokens=32)
    parser.set_defaults(workers=2, replicas=1, http=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--long", type=int, default=900, help="tokens of an answer to the key without limits")
    parser.add_argument("--pace", type=float, default=500, help="requests a second")
    parser.add_argument("--over", type=float, default=100, help="how many times more than the key's limit comes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vanish", type=int, default=1000)
    parser.add_argument("--rest", type=float, default=6, help="seconds")
    parser.add_argument("--growth", type=float, default=8, help="MiB")
    parser.add_argument("--ceiling", type=float, default=512, help="MiB, after nonsense")
    parser.add_argument("--hostile", default="vanish,slow-readers,idle,large-bodies,long-arrays,deep-json,numbers")
    parser.add_argument("--hostile-rounds", type=int, default=2)
    parser.add_argument("--picture", default="flood.svg")
    options = parser.parse_args()
    campaign = Campaign(options)
    try:
        asyncio.run(campaign.run())
        campaign.look_at_processes()
    finally:
        campaign.cluster.stop()
    campaign.look_at_memory()
    campaign.draw()
    result = campaign.result()
    table(result)
    print(json.dumps(result))
    sys.exit(1 if campaign.broken else 0)


main()
