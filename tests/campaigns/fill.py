#!/usr/bin/env python3
"""Kills a process while it fills its NVMe cache, at random moments, and sees what the next ones make of what is left.

    python3 tests/campaigns/fill.py --kills 200
    python3 tests/campaigns/fill.py --kills 200 --flip 0.2

Each round starts `lite-llm run --model … --nvme DIR:SIZE --dram SIZE`, kills it (SIGKILL) at a random moment of its
life, and every --check rounds runs one to its end: its answer must be that of a run without a cache, byte by byte. With
--flip, a part of the rounds also damages a byte of a random file of the cache while nothing runs. After every kill the
cache's files must not exceed its size. Prints one line of JSON; exit code 1 if an answer changed, a start failed, the
cache was too large, or a file was damaged that nobody damaged: "damaged" counts what the processes say of files that
were not as they were written.
"""

import argparse, json, os, pathlib, random, shutil, subprocess, sys, tempfile, time

import cluster as clusters

PROMPTS = ["ls - list", "To print the current", "The grep command", "mount a file system", "EXIT STATUS"]
DAMAGED = b"not on the disk as it was written"
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
BLOCK = 4096


def size(text):
    """Bytes of `64MiB`."""
    for unit, bytes_of in UNITS.items():
        if text.endswith(unit):
            return int(float(text[: -len(unit)]) * bytes_of)
    return int(text)


class Campaign:
    def __init__(self, options):
        self.options, self.dice = options, random.Random(options.seed)
        self.state = pathlib.Path(tempfile.mkdtemp(prefix="lite-llm-fill-", dir=options.folder))
        self.cache = self.state / "nvme"
        self.expected, self.took = {}, 0.0
        self.kills = self.killed_late = self.checked = self.flips = self.damaged = 0
        self.changed, self.failed, self.too_large, self.parts = [], [], [], 0
        self.most = 0

    def command(self, prompt, nvme=True):
        options = self.options
        cache = ["--nvme", f"{self.cache}:{options.nvme}", "--dram", options.dram] if nvme else []
        return [options.binary, "run", "--model", options.model, *cache, "--max-tokens", str(options.tokens),
                "--ignore-eos", "--temperature", "0.8", "--seed", "7", PROMPTS[prompt]]

    def start(self, prompt, nvme=True):
        environment = {**os.environ, "RUST_LOG": os.environ.get("RUST_LOG", "warn")}
        return subprocess.Popen(self.command(prompt, nvme), env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def finish(self, prompt, nvme=True):
        begun, process = time.time(), self.start(prompt, nvme)
        try:
            text, words = process.communicate(timeout=self.options.patience)
        except subprocess.TimeoutExpired:
            process.kill()
            text, words = process.communicate()
            words += b"\nit did not end in time"
            process.returncode = process.returncode or 1
        self.damaged += words.count(DAMAGED)
        return text, process.returncode, words.decode(errors="replace"), time.time() - begun

    def prepare(self):
        for prompt in range(len(PROMPTS)):
            text, code, words, _ = self.finish(prompt, nvme=False)
            if code != 0 or not text:
                sys.exit(f"a run without a cache fails: {words[-500:]}")
            self.expected[prompt] = text
        # How long one takes that fills: the moments are drawn from that.
        *_, self.took = self.check("the first fill")

    def check(self, when):
        prompt = self.dice.randrange(len(PROMPTS))
        text, code, words, took = self.finish(prompt)
        self.checked += 1
        if code != 0:
            self.failed.append(f"{when}: {words.strip()[-300:]}")
        elif text != self.expected[prompt]:
            self.changed.append(f"{when}: {text[:80]!r} for {self.expected[prompt][:80]!r}")
        self.measure(when)
        return text, code, words, took

    def files(self):
        return [path for path in self.cache.rglob("experts-*/*") if path.is_file()]

    def measure(self, when):
        """What is on the disk is never more than the cache may hold."""
        files = self.files()
        held = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files)
        self.most = max(self.most, held)
        self.parts += sum(path.suffix == ".part" for path in files)
        if held > size(self.options.nvme):
            self.too_large.append(f"{when}: {held} bytes")

    def flip(self):
        files = self.files()
        if files:
            path = self.dice.choice(files)
            content = bytearray(path.read_bytes())
            if content:
                content[self.dice.randrange(len(content))] ^= 1 << self.dice.randrange(8)
                path.write_bytes(content)
                self.flips += 1

    def round(self, number):
        # A cache that is full is filled no more.
        if self.dice.random() < self.options.fresh:
            shutil.rmtree(self.cache, ignore_errors=True)
        process = self.start(self.dice.randrange(len(PROMPTS)))
        try:
            process.wait(self.dice.uniform(0.0, self.took))
        except subprocess.TimeoutExpired:
            process.kill()
        _, words = process.communicate()
        self.damaged += words.count(DAMAGED)
        self.kills += process.returncode == -9
        self.killed_late += process.returncode == 0
        if process.returncode not in (-9, 0):
            self.failed.append(f"round {number}: {words.decode(errors='replace').strip()[-300:]}")
        self.measure(f"round {number}")
        if self.dice.random() < self.options.flip:
            self.flip()
        if number % self.options.check == 0:
            self.check(f"after round {number}")

    def run(self):
        self.prepare()
        number = 0
        while self.kills < self.options.kills and number < 4 * self.options.kills:
            number += 1
            self.round(number)
        self.check("at the end")

    def result(self):
        return {
            "kills": self.kills, "ended_before": self.killed_late, "answers": self.checked,
            "changed": len(self.changed), "failed": len(self.failed), "too_large": len(self.too_large),
            "damaged": self.damaged, "flipped": self.flips, "unfinished_files": self.parts,
            "most_bytes": self.most, "budget": size(self.options.nvme),
            "errors": [*self.changed, *self.failed, *self.too_large][:3],
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    clusters.arguments(parser, tokens=24)
    parser.set_defaults(dram="8MiB")
    parser.add_argument("--nvme", default="64MiB", help="size of the cache, with a unit")
    parser.add_argument("--folder", default="/var/tmp", help="where the cache is to be; not in memory")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--check", type=int, default=5, help="rounds between runs that may end")
    parser.add_argument("--fresh", type=float, default=0.3, help="part of the rounds that begin with an empty cache")
    parser.add_argument("--flip", type=float, default=0.0, help="part of the rounds that damage a file")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds that a run may take")
    options = parser.parse_args()
    campaign = Campaign(options)
    try:
        campaign.run()
    finally:
        shutil.rmtree(campaign.state, ignore_errors=True)
    result = campaign.result()
    print(json.dumps(result))
    # A killed process loses nothing that it wrote: a file that has its name is whole.
    invented = options.flip == 0 and result["damaged"]
    sys.exit(1 if result["changed"] or result["failed"] or result["too_large"] or invented else 0)


main()
