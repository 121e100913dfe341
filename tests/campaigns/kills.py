#!/usr/bin/env python3
"""Kills and pauses processes of a real cluster while jobs run, and counts what came of them.

    python3 tests/campaigns/kills.py --binary target/release/lite-llm --faults 300 --replicas 2

Every answer is compared, token by token, with the answer of the same job before the first fault.
Needs nothing but Python. Prints one line of JSON; exit code 1 if a job was lost, came twice or changed.
"""

import argparse, json, os, pathlib, random, signal, subprocess, sys, tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = ["ls - list", "To print the current", "The grep command", "mount a file system", "EXIT STATUS"]


class Cluster:
    def __init__(self, options):
        self.options = options
        self.state = tempfile.mkdtemp(prefix="lite-llm-kills-")
        self.log = open(os.path.join(self.state, "log"), "ab")
        self.port = random.Random(os.getpid()).randrange(20000, 50000)
        self.coordinator = self.start_coordinator()
        while not os.path.exists(self.token()):
            time.sleep(0.05)
        self.workers = {name: self.start_worker(name) for name in "abcdefgh"[: options.workers]}

    def token(self):
        worker = os.path.join(self.state, "worker.token")
        return worker if os.path.exists(worker) else os.path.join(self.state, "join-token")

    def client_token(self):
        client = os.path.join(self.state, "client.token")
        return client if os.path.exists(client) else os.path.join(self.state, "join-token")

    def start(self, *args):
        command = [self.options.binary, *map(str, args)]
        return subprocess.Popen(command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)

    def start_coordinator(self):
        return self.start("coordinator", "--model", self.options.model, "--workers", self.options.workers,
                          "--replicas", self.options.replicas, "--state", self.state,
                          "--listen", f"127.0.0.1:{self.port}")

    def start_worker(self, name):
        return self.start("worker", "--token", self.token(), "--name", name, "--threads", 1,
                          "--dram", self.options.dram, "--kv", "64MiB", "--patience", "120s")

    def status(self):
        ran = subprocess.run([self.options.binary, "status", "--json", "--token", self.client_token()],
                             capture_output=True, text=True)
        return json.loads(ran.stdout) if ran.returncode == 0 else None

    def ready(self, within):
        end = time.time() + within
        while time.time() < end:
            status = self.status()
            if status and status["state"] == "ready" and len(status["nodes"]) == self.options.workers:
                return True
            time.sleep(0.1)
        return False

    def stop(self):
        for process in [self.coordinator, *self.workers.values()]:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


class Reader(threading.Thread):
    """One job after the other, each a `submit` that streams; when its text grew is noted."""

    def __init__(self, cluster, campaign, number):
        super().__init__()
        self.cluster, self.campaign = cluster, campaign
        self.random = random.Random(number)
        self.grew, self.running = 0.0, False

    def job(self):
        return self.random.randrange(len(PROMPTS)), self.random.randrange(4)

    def run(self):
        while not self.campaign.over:
            key = self.job()
            text, code, error = self.submit(key)
            with self.campaign.lock:
                self.campaign.jobs += 1
                expected = self.campaign.expected[key]
                if code != 0:
                    self.campaign.failed.append(error.strip()[-300:])
                elif text != expected:
                    self.campaign.changed.append((key, len(text), len(expected)))

    def submit(self, key):
        prompt, seed = key
        command = [self.cluster.options.binary, "submit", "--token", self.cluster.client_token(),
                   "--max-tokens", str(self.cluster.options.tokens), "--ignore-eos", "--retry", "60s",
                   "--temperature", "0.8", "--seed", str(seed), PROMPTS[prompt]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        errors = []
        drain = threading.Thread(target=lambda: errors.append(process.stderr.read()))
        drain.start()
        text = b""
        while chunk := os.read(process.stdout.fileno(), 65536):
            text += chunk
            self.grew, self.running = time.time(), True
        self.running = False
        process.wait()
        drain.join()
        return text, process.returncode, errors[0].decode(errors="replace")


class Campaign:
    def __init__(self):
        self.lock, self.over = threading.Lock(), False
        self.jobs, self.failed, self.changed = 0, [], []
        self.expected, self.gaps = {}, []


def quantile(values, q):
    values = sorted(values)
    return round(values[min(len(values) - 1, int(q * len(values)))], 3) if values else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=str(ROOT / "target/release/lite-llm"))
    parser.add_argument("--model", default=str(ROOT / "models/manpages-moe"))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--dram", default="1GiB")
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--kinds", default="kill,stop", help="of kill, stop, coordinator, pause-any")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    dice, campaign, cluster = random.Random(options.seed), Campaign(), Cluster(options)
    counts = {}
    try:
        if not cluster.ready(120):
            sys.exit(f"the cluster does not become ready; see {cluster.state}/log")
        probe = Reader(cluster, campaign, 0)
        for prompt in range(len(PROMPTS)):
            for seed in range(4):
                text, code, error = probe.submit((prompt, seed))
                if code != 0:
                    sys.exit(error)
                campaign.expected[(prompt, seed)] = text
        readers = [Reader(cluster, campaign, n) for n in range(options.readers)]
        for reader in readers:
            reader.start()
        began, recovered = time.time(), []
        for _ in range(options.faults):
            time.sleep(dice.uniform(0.3, 1.0))
            kind = dice.choice(options.kinds.split(","))
            name = dice.choice(list(cluster.workers))
            counts[kind] = counts.get(kind, 0) + 1
            waiting = [reader for reader in readers if reader.running]
            at = time.time()
            if kind == "kill":
                cluster.workers[name].kill()
                cluster.workers[name].wait()
                down = dice.choice([0.0, dice.uniform(0, 3)])
                note_gaps(campaign, waiting, at)
                time.sleep(max(0, down - (time.time() - at)))
                cluster.workers[name] = cluster.start_worker(name)
            elif kind == "stop":
                cluster.workers[name].send_signal(signal.SIGSTOP)
                time.sleep(dice.uniform(0.2, 3.0))
                cluster.workers[name].send_signal(signal.SIGCONT)
            elif kind == "coordinator":
                cluster.coordinator.kill()
                cluster.coordinator.wait()
                cluster.coordinator = cluster.start_coordinator()
            elif kind == "pause-any":
                process = dice.choice([cluster.coordinator, *cluster.workers.values()])
                process.send_signal(signal.SIGSTOP)
                time.sleep(dice.uniform(1.0, 3.0))
                process.send_signal(signal.SIGCONT)
            at = time.time()
            if not cluster.ready(60):
                campaign.failed.append(f"not ready within 60 s after {kind} of {name}: {cluster.status()}")
                break
            recovered.append(time.time() - at)
            for worker, process in cluster.workers.items():
                if process.poll() is not None:
                    campaign.failed.append(f"worker {worker} ended with {process.returncode}")
                    cluster.workers[worker] = cluster.start_worker(worker)
        campaign.over = True
        for reader in readers:
            reader.join()
    finally:
        campaign.over = True
        cluster.stop()
    print(json.dumps({
        "faults": counts, "replicas": options.replicas, "workers": options.workers,
        "jobs": campaign.jobs, "failed": len(campaign.failed), "changed": len(campaign.changed),
        "next_token_after_kill": {"p50": quantile(campaign.gaps, 0.5), "p99": quantile(campaign.gaps, 0.99),
                                  "of": len(campaign.gaps)},
        "ready_after": {"p50": quantile(recovered, 0.5), "p99": quantile(recovered, 0.99)},
        "seconds": round(time.time() - began), "errors": campaign.failed[:3], "differ": campaign.changed[:3],
        "log": cluster.state + "/log",
    }))
    sys.exit(1 if campaign.failed or campaign.changed else 0)


def note_gaps(campaign, waiting, at):
    """Of the jobs that ran when a worker was killed: how long each waited for its next text. The worst
    job of every kill is kept: it is one that was at home there, or needed its experts."""
    end, worst = time.time() + 10, 0.0
    open_jobs = list(waiting)
    while open_jobs and time.time() < end:
        for reader in list(open_jobs):
            if reader.grew > at + 0.02 or not reader.running:
                worst = max(worst, reader.grew - at)
                open_jobs.remove(reader)
        time.sleep(0.005)
    if waiting:
        campaign.gaps.append(10.0 if open_jobs else worst)


main()
