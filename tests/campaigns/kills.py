#!/usr/bin/env python3
"""Kills and pauses processes of a real cluster, or cuts its links, while jobs run, and counts what came of them.

    python3 tests/campaigns/kills.py --faults 300 --replicas 2
    python3 tests/campaigns/kills.py --hosts --faults 100

Every answer is compared, byte by byte, with the answer of the same job before the first fault. Needs nothing but
Python (and, with --hosts, root and iproute2: it skips with a line where they are not). Prints one line of JSON; exit
code 1 if a job was lost, came twice or changed.
"""

import argparse, bisect, collections, json, os, random, signal, subprocess, sys, threading, time
from concurrent import futures

import cluster as clusters
from hosts import Hosts, Impossible

PROMPTS = ["ls - list", "To print the current", "The grep command", "mount a file system", "EXIT STATUS"]
CUTS = ["cut-workers", "cut-one-way", "cut-coordinator", "cut-client", "slow", "lossy"]

NOT_LET_IN = ["no coordinator answered", "could not connect to a coordinator"]


class Job:
    """When the text of one job grew."""

    def __init__(self):
        self.grew, self.over = [], False

    def silence(self, at, until, limit):
        """The longest that its reader saw nothing, of what began or went on between two times, up to a limit."""
        times = [*self.grew, *([] if self.over else [limit])]
        pairs = zip(times, times[1:])
        return max((min(b, limit) - max(a, at) for a, b in pairs if b > at and a < until), default=None)


# What was done to whom, the jobs that ran then, and when it began, was over, and all workers served again.
Fault = collections.namedtuple("Fault", "kind what running at healed ready")


class Reader(threading.Thread):
    """One job after the other, each a `submit` that streams."""

    def __init__(self, campaign, number):
        super().__init__(daemon=True)
        self.campaign, self.random, self.job = campaign, random.Random(number), Job()

    def run(self):
        while not self.campaign.over:
            key = self.random.randrange(len(PROMPTS)), self.random.randrange(4)
            text, code, error = self.submit(*key)
            with self.campaign.lock:
                self.campaign.jobs += 1
                expected = self.campaign.expected[key]
                if code != 0 and not text and any(words in error for words in NOT_LET_IN):
                    self.campaign.turned_away += 1
                elif code != 0:
                    self.campaign.failed.append(time.strftime("%H:%M:%S ", time.gmtime()) + error.strip()[-300:])
                elif text != expected:
                    self.campaign.changed.append((key, len(text), len(expected)))

    def submit(self, prompt, seed):
        process = self.campaign.cluster.submit(
            "--max-tokens", str(self.campaign.options.tokens), "--ignore-eos", "--retry", "60s",
            "--temperature", "0.8", "--seed", str(seed), PROMPTS[prompt],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        errors = []
        drain = threading.Thread(target=lambda: errors.append(process.stderr.read()))
        drain.start()
        text, self.job = b"", Job()
        while chunk := os.read(process.stdout.fileno(), 65536):
            text += chunk
            self.job.grew.append(time.time())
            self.campaign.texts.append(time.time())
        self.job.over = True
        process.wait()
        drain.join()
        return text, process.returncode, errors[0].decode(errors="replace")


class Campaign:
    def __init__(self, options, hosts):
        self.options, self.hosts, self.dice = options, hosts, random.Random(options.seed)
        self.lock, self.over, self.expected = threading.Lock(), False, {}
        self.jobs, self.failed, self.changed = 0, [], []
        # Clients that began while nothing answered them, and said so: a new one tries twice, for the address may be
        # wrong, and had no job yet.
        self.turned_away = 0
        self.faults, self.recovered, self.texts = [], [], []
        self.loaded_again = 0
        self.cluster = clusters.Cluster(options, hosts)

    def prepare(self):
        """The answers without faults."""
        if not self.cluster.ready(120):
            sys.exit(f"the cluster does not become ready; see {self.cluster.state}/log")
        keys = [(prompt, seed) for prompt in range(len(PROMPTS)) for seed in range(4)]
        with futures.ThreadPoolExecutor(self.options.readers) as pool:
            answers = pool.map(lambda key: Reader(self, 0).submit(*key), keys)
        for key, (text, code, error) in zip(keys, answers):
            if code != 0:
                sys.exit(error)
            self.expected[key] = text

    def note_loaded(self, status):
        """How many experts at most a worker lacks, by its own account, whose process is the one that it was."""
        for node in status["nodes"]:
            self.loaded_again = max(self.loaded_again, node["experts"] - node["experts_loaded"])

    def run(self):
        self.prepare()
        readers = [Reader(self, n) for n in range(self.options.readers)]
        for reader in readers:
            reader.start()
        while any(not reader.job.grew for reader in readers):
            time.sleep(0.05)
        self.began = time.time()
        for _ in range(self.options.faults):
            time.sleep(self.dice.uniform(0.3, 1.0))
            kind = self.dice.choice(self.options.kinds.split(","))
            name = self.dice.choice(list(self.cluster.workers))
            running = [reader.job for reader in readers if reader.job.grew and not reader.job.over]
            at = time.time()
            what = self.fault(kind, name)
            healed = time.time()
            well = self.is_well_after(kind, name, healed)
            self.faults.append(Fault(kind, what, running, at, healed, time.time()))
            if not well:
                break
        self.over = True
        for reader in readers:
            reader.join()

    def is_well_after(self, kind, name, healed):
        seen = self.note_loaded if kind == "coordinator" else None
        if not self.cluster.ready(60, seen):
            self.failed.append(f"not ready within 60 s after {kind} of {name}: {self.cluster.status()}")
            return False
        self.recovered.append(time.time() - healed)
        for worker, process in self.cluster.workers.items():
            if process.poll() is not None:
                self.failed.append(f"worker {worker} ended with {process.returncode}")
                self.cluster.start_worker(worker)
        return True

    def fault(self, kind, name):
        cluster, dice = self.cluster, self.dice
        if kind == "kill":
            cluster.workers[name].kill()
            cluster.workers[name].wait()
            time.sleep(dice.choice([0.0, dice.uniform(0, 3)]))
            cluster.start_worker(name)
        elif kind == "coordinator":
            cluster.coordinator.kill()
            cluster.coordinator.wait()
            cluster.coordinator = cluster.start_coordinator()
        elif kind in ("stop", "pause-any"):
            name, least = (name, 0.2) if kind == "stop" else (dice.choice(list(cluster.processes())), 1.0)
            process = cluster.processes()[name]
            process.send_signal(signal.SIGSTOP)
            time.sleep(dice.uniform(least, 3.0))
            process.send_signal(signal.SIGCONT)
        else:
            name = self.cut(kind, name)
        return name

    def cut(self, kind, name):
        dice, hosts = self.dice, self.hosts
        other = dice.choice([host for host in [*self.cluster.workers, "coordinator"] if host != name])
        worker = dice.choice([host for host in self.cluster.workers if host != name])
        way = dice.choice([(name, other), (other, name)])
        both = lambda one, another: [(one, another), (another, one)]
        ways = {"cut-workers": both(name, worker), "cut-one-way": [way], "cut-coordinator": both(name, "coordinator"),
                "cut-client": both("client", "coordinator")}.get(kind, both(name, other))
        if kind == "slow":
            hosts.slow(dice.uniform(0.005, 0.3), 0.0, *ways)
        elif kind == "lossy":
            hosts.slow(0.0, dice.uniform(0.01, 0.4), *ways)
        else:
            hosts.cut(*ways)
        time.sleep(dice.uniform(0.3, 6.0))
        hosts.heal()
        return ">".join(ways[0])

    def silences(self):
        """Of the jobs that ran at each fault the one that waited longest: it was at home there, or needed its experts.
        What lasts until the next fault is counted with that one from then on."""
        limits = [fault.at for fault in self.faults[1:]] + [time.time()]
        for fault, limit in zip(self.faults, limits):
            waits = [job.silence(fault.at, fault.ready, limit) for job in fault.running]
            longest = max((wait for wait in waits if wait is not None), default=None)
            if longest is not None:
                stamp = time.strftime("%H:%M:%S", time.gmtime(fault.at))
                lasted = f"for {fault.healed - fault.at:.2f} s"
                yield fault.kind, longest, f"{longest:.2f} s: {fault.kind} {fault.what} at {stamp} {lasted}"

    def result(self):
        texts = [*sorted(self.texts), float("inf")]
        served = [texts[bisect.bisect(texts, fault.healed)] - fault.healed for fault in self.faults]
        silences, kinds = sorted(self.silences(), key=lambda of: -of[1]), sorted({fault.kind for fault in self.faults})
        after = {kind: clusters.quantiles([wait for of, wait, _ in silences if of == kind]) for kind in kinds}
        return {
            "faults": {kind: sum(kind == fault.kind for fault in self.faults) for kind in kinds},
            "replicas": self.options.replicas, "workers": self.options.workers,
            "jobs": self.jobs, "tokens_each": self.options.tokens,
            "failed": len(self.failed), "turned_away": self.turned_away, "changed": len(self.changed),
            "next_token_after": after,
            "served_after": clusters.quantiles(served), "ready_after": clusters.quantiles(self.recovered),
            "experts_loaded_again": self.loaded_again,
            "seconds": round(time.time() - self.began), "errors": self.failed[:3], "differ": self.changed[:3],
            "worst": [words for _, _, words in silences[:5]],
            "log": self.cluster.state + "/log",
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    clusters.arguments(parser, tokens=150)
    parser.add_argument("--readers", type=int, default=6)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--hosts", action="store_true", help="each process on a host of its own, whose links are cut")
    parser.add_argument("--kinds", help=f"of kill, stop, coordinator, pause-any and, with --hosts, {', '.join(CUTS)}")
    options = parser.parse_args()
    options.kinds = options.kinds or ",".join(CUTS if options.hosts else ["kill", "stop"])
    try:
        hosts = Hosts(["coordinator", "client", *clusters.names(options)]) if options.hosts else None
    except Impossible as reason:
        print(f"skipped: {reason}")
        return
    campaign = None
    try:
        campaign = Campaign(options, hosts)
        campaign.run()
    finally:
        if campaign:
            campaign.over = True
            campaign.cluster.stop()
        if hosts:
            hosts.down()
    print(json.dumps(campaign.result()))
    sys.exit(1 if campaign.failed or campaign.changed else 0)


main()
