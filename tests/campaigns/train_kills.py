#!/usr/bin/env python3
"""Kills a training run at random moments, lets it go on, and compares what comes of it with a run that nobody disturbed.

    python3 tests/campaigns/train_kills.py --kills 40
    python3 tests/campaigns/train_kills.py --kills 40 --workers 2

The run has three phases, one of which adds a tier, and a checkpoint every few steps. SIGKILL comes at any moment, while
a checkpoint is being written, or while the model is; with --workers, to the run or to one of its workers. After a kill
the run goes on with --resume. At its end the model's files and the losses of every step must be those of the undisturbed
run, byte by byte; what is trained then begins again. Prints one line of JSON; exit code 1 if anything differs, a run does
not go on, or a process stays behind.
"""

import argparse, json, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
out = "{out}"
seed = 7
[model.new]
tokenizer = "{root}/models/manpages-moe"
hidden = 32
layers = 2
heads = 2
kv_heads = 1
head_dim = 16
context = 64
intermediate = 32
routes = [1, 1, 2]
tiers = [{{ name = "tier_1b", groups = 1, experts = 4 }}]
[data]
files = ["{root}/docs/GUIDE.md"]
sequence = 32
batch = 4
held_out = 0.01
evaluate_every = 10
[checkpoint]
every = {every}
[starvation]
rho = 0.0
[[phase]]
name = "0"
tiers = "..tier_1b"
train = {{ backbone = true, tiers = ["tier_1b"] }}
steps = {steps}
lr = 2e-3
[[phase]]
name = "1"
add = {{ name = "tier_10b", groups = 2, experts = 4, init = "copy:tier_1b", k_tier = 2 }}
train = {{ tiers = ["tier_10b"], gates = true }}
balance = {{ tier = 0.01, group = 0.01, expert = 0.01 }}
steps = {steps}
lr = 2e-3
[[phase]]
name = "2"
train = {{ backbone = true, tiers = ["all"], gates = true }}
balance = {{ tier = 0.01, group = 0.01, expert = 0.01 }}
pull = 1e-3
optimizer = {{ kind = "adafactor", eps = 1e-30, scale_min = 1e-3, clip_threshold = 1.0, decay_rate = -0.8, weight_decay = 0.0 }}
steps = {steps}
lr = 1e-3
"""
# Seconds until a run that was to be killed must be over, and a worker without its run.
PATIENCE = 120


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def losses(run):
    """What metrics say of each step and look, but for time."""
    found = {}
    for line in (run / "metrics.jsonl").read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "resumed":
            found = {key: value for key, value in found.items() if key[0] <= event["step"]}
        elif event["event"] in ("step", "evaluated"):
            found[event["step"], event["event"]] = {k: v for k, v in event.items() if k != "seconds"}
    return found


def children(pid):
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                for child in (task / "children").read_text().split()]
    except OSError:
        return []


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Campaign:
    def __init__(self, options, work):
        self.options, self.work, self.random = options, work, random.Random(options.seed)
        self.counts, self.resumed, self.wrong, self.workers = {}, 0, [], set()

    def config(self, name):
        path = self.work / f"{name}.toml"
        path.write_text(CONFIG.format(out=name, root=ROOT, every=self.options.every, steps=self.options.steps))
        return path, self.work / name

    def start(self, config, resume):
        arguments = ["train", config, *(["--resume"] if resume else [])]
        if self.options.workers:
            arguments += ["--workers", self.options.workers, "--threads", 1]
        log = open(self.work / "log", "wb")
        return subprocess.Popen([self.options.program, *map(str, arguments)], stdout=log, stderr=log)

    def complain(self, words):
        self.wrong.append(f"{words}: {(self.work / 'log').read_text(errors='replace').strip()[-400:]}")

    def undisturbed(self):
        config, run = self.config("undisturbed")
        begun = time.time()
        if self.start(config, False).wait() != 0:
            self.complain("the undisturbed run failed")
            return
        self.expected, self.seconds = (files(run / "model"), losses(run)), time.time() - begun

    def moment(self, process, run, kind):
        """Waits for the moment of a kill; false if the run is over before."""
        limit = time.time() + PATIENCE
        after = time.time() + self.random.uniform(0, 1.1 * self.seconds)
        nth = self.random.randrange(4)
        seen, there = 0, False
        while process.poll() is None and time.time() < limit:
            if kind == "any" or kind == "worker":
                if time.time() >= after:
                    return True
            elif kind == "checkpoint":
                now = any(name.endswith(".staging") for name in os.listdir(run)) if run.exists() else False
                seen, there = seen + (now and not there), now
                if now and seen > nth:
                    time.sleep(self.random.uniform(0, 0.01))
                    return True
            elif (run / "model").exists():
                time.sleep(self.random.uniform(0, 0.01))
                return True
            if kind in ("any", "worker"):
                time.sleep(0.002)
        return False

    def kill(self, process, run):
        kinds = ["any", "checkpoint", "model"] + (["worker", "worker"] if self.options.workers else [])
        kind = self.random.choice(kinds)
        if not self.moment(process, run, kind):
            return
        workers = children(process.pid)
        self.workers.update(workers)
        if kind == "worker":
            if not workers:
                return
            os.kill(self.random.choice(workers), signal.SIGKILL)
        else:
            process.kill()
            process.wait()
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def once(self, number):
        """One run from its begin to its end, killed several times."""
        config, run = self.config(f"run-{number}")
        resume, kills = False, self.random.randrange(1, 6)
        while True:
            process = self.start(config, resume)
            before = sum(self.counts.values())
            while kills > 0 and process.poll() is None:
                self.kill(process, run)
                kills -= 1
            try:
                code = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.complain("a run hangs")
                process.kill()
                process.wait()
                return
            if code == 0:
                break
            if code != -signal.SIGKILL or sum(self.counts.values()) == before:
                self.complain(f"run {number} ended with {code}")
                return
            resume = True
            self.resumed += 1
        found = files(run / "model"), losses(run)
        for name, here, there in zip(("model", "losses"), found, self.expected):
            if here != there:
                keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
                self.complain(f"run {number}: {name} differ at {keys[:5]}")
        left = [path.name for path in run.iterdir() if path.name.endswith(".staging")]
        if left:
            self.complain(f"run {number}: {left} is left")

    def main(self):
        self.undisturbed()
        runs = 0
        while not self.wrong and sum(self.counts.values()) < self.options.kills:
            self.once(runs)
            runs += 1
        limit = time.time() + PATIENCE
        while (stay := [pid for pid in self.workers if lives(pid)]) and time.time() < limit:
            time.sleep(0.1)
        if stay:
            self.wrong.append(f"workers stay behind: {stay}")
        print(json.dumps({"runs": runs, "kills": self.counts, "resumed": self.resumed, "workers": self.options.workers,
                          "steps": 3 * self.options.steps, "checkpoint_every": self.options.every,
                          "seconds_undisturbed": round(getattr(self, "seconds", 0), 1), "wrong": self.wrong}))
        return 1 if self.wrong else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="of each of the three phases")
    parser.add_argument("--every", type=int, default=7, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--program", default=ROOT / "target/release/lite-llm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        return Campaign(options, Path(work)).main()


if __name__ == "__main__":
    sys.exit(main())
