#!/usr/bin/env python3
"""What a coordinator and its workers take of memory while clients vanish, do not read, or may not join.

    python3 tests/campaigns/memory.py

VmRSS and the part of it that is no mapped file, of each process: before, highest, and after a while of rest, in MiB.
Each load comes in rounds, so that what grows with each is seen. Prints one line of JSON; exit code 1 if a process
grew by more than --growth MiB from the first round's end to the last's.
"""

import argparse, fcntl, json, os, shutil, subprocess, sys, threading, time

import cluster as clusters

F_SETPIPE_SZ = 1031


def memory(process):
    """Resident and anonymous KiB."""
    fields = dict(line.split(":", 1) for line in open(f"/proc/{process.pid}/status"))
    return [int(fields[key].split()[0]) for key in ("VmRSS", "RssAnon")]


class Watch(threading.Thread):
    """The highest that each process takes until it is told to end."""

    def __init__(self, processes):
        super().__init__(daemon=True)
        self.processes, self.peak, self.over = processes, {name: [0, 0] for name in processes}, False

    def run(self):
        while not self.over:
            for name, process in self.processes.items():
                self.peak[name] = [max(pair) for pair in zip(self.peak[name], memory(process))]
            time.sleep(0.05)


class Loads:
    """Each is one round of a load."""

    def __init__(self, cluster, options):
        self.cluster, self.options = cluster, options
        self.wrong = os.path.join(cluster.state, "wrong.token")
        shutil.copy(cluster.token("worker"), self.wrong)
        # The coordinator takes another secret from now on.
        subprocess.run(cluster.command("coordinator", "token", "worker", "--rotate", "--state", cluster.state),
                       check=True, stdout=cluster.log)

    def job(self, seed, **how):
        return self.cluster.submit("--max-tokens", self.options.tokens, "--ignore-eos", "--temperature", "0.8",
                                   "--seed", seed, "ls - list", stderr=subprocess.DEVNULL, **how)

    def vanish(self):
        """200 clients that are killed when their text has begun."""
        for wave in range(10):
            clients = [self.job(wave * 20 + n, stdout=subprocess.PIPE) for n in range(20)]
            for client in clients:
                client.stdout.read(1)
                client.kill()
                client.wait()
                client.stdout.close()

    def slow_readers(self):
        """50 clients whose text nobody takes, for 15 seconds."""
        clients = []
        for seed in range(50):
            ours, theirs = os.pipe()
            size = fcntl.fcntl(theirs, F_SETPIPE_SZ, 4096)
            os.write(theirs, b" " * size)
            clients.append((self.job(seed, stdout=theirs), ours))
            os.close(theirs)
        time.sleep(15)
        for client, ours in clients:
            client.kill()
            client.wait()
            os.close(ours)

    def joiners(self):
        """200 workers with a secret that is none any more, 25 at a time."""
        for _ in range(8):
            command = self.cluster.command("x", "worker", "--token", self.wrong, "--patience", "2s", "--dram", "64MiB")
            joiners = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                       for _ in range(25)]
            for joiner in joiners:
                self.told = joiner.communicate()[1].strip()[-200:]
                if joiner.returncode == 0:
                    sys.exit("a joiner with a wrong secret was let in")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    clusters.arguments(parser, tokens=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rest", type=float, default=5)
    parser.add_argument("--growth", type=float, default=8, help="MiB")
    options = parser.parse_args()
    cluster = clusters.Cluster(options)
    figures, grown = {}, []
    in_mib = lambda pair: [round(kib / 1024, 1) for kib in pair]
    try:
        if not cluster.ready(120):
            sys.exit(f"the cluster does not become ready; see {cluster.state}/log")
        loads = Loads(cluster, options)
        processes = cluster.processes()
        for load in (loads.vanish, loads.slow_readers, loads.joiners):
            watch = Watch(processes)
            before = {name: memory(process) for name, process in processes.items()}
            watch.start()
            rounds = []
            for _ in range(options.rounds):
                load()
                time.sleep(options.rest)
                rounds.append({name: memory(process) for name, process in processes.items()})
            watch.over = True
            watch.join()
            figures[load.__name__] = {
                name: {"before": in_mib(before[name]), "peak": in_mib(watch.peak[name]),
                       "after_rounds": [in_mib(after[name]) for after in rounds]} for name in processes}
            for name in processes:
                if (rounds[-1][name][1] - rounds[0][name][1]) / 1024 > options.growth:
                    grown.append(f"{name} by {load.__name__}")
        status, told = cluster.status(), loads.told
    finally:
        cluster.stop()
    print(json.dumps({"MiB of [VmRSS, RssAnon]": figures, "grown": grown, "joiners_told": told,
                      "state_after": status["state"], "jobs_running_after": status["jobs_running"]}))
    sys.exit(1 if grown or status["state"] != "ready" else 0)


main()
