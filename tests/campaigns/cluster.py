"""A real cluster of processes for the campaigns, on loopback or on hosts of their own."""

import json, os, pathlib, random, signal, subprocess, sys, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def arguments(parser, tokens):
    """The options that every campaign has."""
    parser.add_argument("--binary", default=str(ROOT / "target/release/lite-llm"))
    parser.add_argument("--model", default=str(ROOT / "models/manpages-moe"))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--dram", default="1GiB")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--seed", type=int, default=1)
    # So that whatever ends a campaign, its processes end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))


class Cluster:
    def __init__(self, options, hosts=None):
        self.options, self.hosts = options, hosts
        self.state = tempfile.mkdtemp(prefix="lite-llm-campaign-")
        self.log = open(os.path.join(self.state, "log"), "ab")
        self.address = hosts.address("coordinator") if hosts else "127.0.0.1"
        self.port = random.Random(os.getpid()).randrange(20000, 30000)
        # Of the HTTP API, for campaigns that speak it.
        self.http = ("127.0.0.1", self.port) if getattr(options, "http", False) else None
        self.workers = {}
        self.coordinator = self.start_coordinator()
        while not os.path.exists(self.token("worker")) or not os.path.exists(self.token("client")):
            if self.coordinator.poll() is not None:
                sys.exit(f"the coordinator does not start; see {self.state}/log")
            time.sleep(0.05)
        for name in names(options):
            self.start_worker(name)

    def token(self, role):
        return os.path.join(self.state, f"{role}.token")

    def command(self, host, *args):
        place = self.hosts.on(host) if self.hosts else []
        return [*place, self.options.binary, *map(str, args)]

    def start(self, host, *args):
        return subprocess.Popen(self.command(host, *args), stdout=self.log, stderr=self.log,
                                stdin=subprocess.DEVNULL)

    def start_coordinator(self):
        http = ["--http", "%s:%d" % self.http, "--http-model", "m"] if self.http else []
        more = getattr(self.options, "coordinator", [])
        return self.start("coordinator", "coordinator", "--model", self.options.model,
                          "--workers", self.options.workers, "--replicas", self.options.replicas,
                          "--state", self.state, "--listen", f"{self.address}:{self.port}", *http, *more)

    def start_worker(self, name, *more):
        self.workers[name] = self.start(
            name, "worker", "--token", self.token("worker"), "--name", name, "--threads", 1,
            "--dram", self.options.dram, "--kv", "64MiB", "--patience", "120s", *more)

    def key(self, name, *limits):
        """A new key of the HTTP API."""
        command = self.command("coordinator", "key", "--state", self.state, "--json", "add", name, *limits)
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["key"]

    def submit(self, *args, **how):
        command = self.command("client", "submit", "--token", self.token("client"), *args)
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **how)

    def status(self):
        """Asked on the coordinator's host, which no cut parts from it."""
        ask = self.command("coordinator", "status", "--json", "--token", self.token("client"), "--retry", "1s")
        ran = subprocess.run(ask, capture_output=True, text=True)
        return json.loads(ran.stdout) if ran.returncode == 0 else None

    def ready(self, within, seen=None):
        """Waits until all workers are here and serve; `seen` is told every state on the way."""
        end = time.time() + within
        while time.time() < end:
            status = self.status()
            if status and seen:
                seen(status)
            if status and status["state"] == "ready" and len(status["nodes"]) == self.options.workers:
                return True
            time.sleep(0.1)
        return False

    def processes(self):
        return {"coordinator": self.coordinator, **self.workers}

    def stop(self):
        for process in self.processes().values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def names(options):
    return "abcdefgh"[: options.workers]


def quantiles(values):
    values = sorted(values)
    at = lambda q: round(values[min(len(values) - 1, int(q * len(values)))], 3)
    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0), "of": len(values)} if values else None
