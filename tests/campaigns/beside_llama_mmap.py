#!/usr/bin/env python3
"""A model larger than memory: lite-llm beside llama.cpp with mmap, in turns, in one control group's memory.

  tests/campaigns/beside_llama_mmap.py --llama-bench FILE --gguf FILE.gguf --model DIR [--binary FILE]
                                       [--memory 3GiB] [--tokens 24] [--rounds 3] [--threads 2] [--asked 8]
                                       [--disk BYTES]

FILE.gguf and DIR hold the same weights, as of benches/beside_llama.py: the GGUF in Q8_0, the checkpoint in int8.
Each run is a process of its own in a new control group with so much memory, page cache included (v1 or v2; needs
root), with the model's files dropped from the page cache before. Both decode one request with a token drawn at
random from the whole vocabulary at each step, as llama-bench does: routing repeats nothing. Budgets are lite-llm's
defaults, which it finds from the group. Bytes read are those of /proc/PID/io from the first token to the last.

Then the medians, llama.cpp's beside ours, and how much of what `lite-llm plan` read from the disk with a bare loop
in the same turn ours moved. Ends with 1 if ours is less than --asked times as fast.
"""

import argparse, json, os, pathlib, statistics, subprocess, sys, tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def size(text):
    unit = next((unit for unit in UNITS if text.endswith(unit)), None)
    return int(float(text.removesuffix(unit or "")) * UNITS.get(unit, 1))


class Group:
    """A control group with so much memory; swap counts where the kernel counts it."""

    def __init__(self, memory):
        v2 = "/sys/fs/cgroup/cgroup.controllers"
        new = os.path.exists(v2) and "memory" in open(v2).read().split()
        self.path = f"/sys/fs/cgroup/{'' if new else 'memory/'}lite-llm-{os.getpid()}"
        self.peak = os.path.join(self.path, "memory.peak" if new else "memory.max_usage_in_bytes")
        os.makedirs(self.path)
        self.write("memory.max" if new else "memory.limit_in_bytes", memory)
        for name, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", memory)):
            if os.path.exists(os.path.join(self.path, name)):
                self.write(name, value)

    def write(self, name, value):
        with open(os.path.join(self.path, name), "w") as file:
            file.write(str(value))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for _ in range(50):
            try:
                return os.rmdir(self.path)
            except OSError:
                time.sleep(0.1)


def drop(path):
    """Has the page cache forget a file, or the files of a folder."""
    files = [path] if os.path.isfile(path) else [os.path.join(f, n) for f, _, names in os.walk(path) for n in names]
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command, memory, deadline):
    """Standard output, when the process read how many bytes in all, when it ended, and the group's peak."""
    read, over = [], threading.Event()
    with Group(memory) as group, tempfile.TemporaryFile("w+") as errors:
        enter = lambda: group.write("cgroup.procs", os.getpid())
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=enter)

        def watch():
            while not over.wait(0.02):
                try:
                    fields = dict(line.split(": ") for line in open(f"/proc/{child.pid}/io"))
                    read.append((time.monotonic(), int(fields["read_bytes"])))
                except (OSError, ValueError, KeyError):
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            out, _ = child.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            child.kill()
            sys.exit(f"{' '.join(command)}\ndid not end within {deadline} s")
        finally:
            over.set()
        ended = time.monotonic()
        watcher.join()
        peak = int(open(group.peak).read())
        if child.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\nended with {child.returncode}:\n{errors.read()[-2000:]}")
    return out, read, ended, peak


def since(read, at):
    """Bytes that were read from some moment on."""
    before = [total for when, total in read if when <= at]
    return read[-1][1] - (before[-1] if before else 0)


def llama(options):
    drop(options.gguf)
    command = [options.llama_bench, "-m", options.gguf, "-t", str(options.threads), "-p", "0",
               "-n", str(options.tokens), "-r", "1", "-o", "json", "-lm", "mmap", "--repack", "0"]
    out, read, ended, peak = run(command, options.memory, options.deadline)
    rate = json.loads(out)[0]["avg_ts"]
    return rate, since(read, ended - options.tokens / rate) / options.tokens, peak


def ours(options, seed):
    drop(options.model)
    # At this temperature every token is as likely as any other.
    command = [options.binary, "run", "--model", options.model, "--threads", str(options.threads), "--json",
               "--max-tokens", str(options.tokens + 1), "--ignore-eos", "--temperature", "1000000", "--top-k", "0",
               "--seed", str(seed), "a"]
    out, read, ended, peak = run(command, options.memory, options.deadline)
    answer = json.loads(out)
    if len(answer["ids"]) != options.tokens + 1:
        sys.exit(f"{len(answer['ids'])} tokens came")
    rate = answer["tokens_per_second"]
    return rate, since(read, ended - options.tokens / rate) / options.tokens, peak


def disk(options):
    """Bytes per second of a bare loop."""
    drop(options.model)
    command = [options.binary, "plan", "--model", options.model, "--tokens", "8", "--dram", "1GiB", "--json"]
    return json.loads(subprocess.check_output(command))["measured"]["disk_bytes_per_second"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--binary", default=str(ROOT / "target/release/lite-llm"))
    parser.add_argument("--memory", type=size, default=3 << 30)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=900, help="seconds of one run")
    parser.add_argument("--disk", type=float, help="bytes per second, instead of what plan measures in each turn")
    parser.add_argument("--asked", type=float, default=8)
    options = parser.parse_args()
    rows = []
    print(f"{'':<8} {'tokens/s':>9} {'read per token':>15} {'peak of the group':>18}")
    for turn in range(options.rounds):
        row = {"disk": options.disk or disk(options)}
        for name, measure in (("llama", lambda: llama(options)), ("ours", lambda: ours(options, turn))):
            row[name] = rate, read, peak = measure()
            print(f"{name:<8} {rate:>9.3f} {read / 2**20:>11.0f} MiB {peak / 2**20:>14.0f} MiB", flush=True)
        rows.append(row)
    median = lambda of: statistics.median(map(of, rows))
    theirs, mine = (median(lambda row: row[name][0]) for name in ("llama", "ours"))
    print(json.dumps({
        "tokens_per_second": {"llama": theirs, "ours": mine}, "times": mine / theirs, "asked": options.asked,
        "read_per_token": {name: median(lambda row: row[name][1]) for name in ("llama", "ours")},
        "disk_bytes_per_second": median(lambda row: row["disk"]),
        "of_the_disk": {name: median(lambda row: row[name][0] * row[name][1] / row["disk"])
                        for name in ("llama", "ours")},
    }))
    sys.exit(0 if mine >= options.asked * theirs else 1)


main()
