#!/usr/bin/env python3
"""The same bits and a bounded memory, however little of a model's experts memory holds.

  tests/campaigns/budget.py --model DIR|URL [--binary FILE] [--shares 100,50,25,10] [--workers 1,3]
                            [--nvme DIR] [--prompts 3] [--length 48] [--greedy 16]

Evaluates prompts with memory for so many percent of the experts, and compares logits and greedy tokens
byte for byte with the run that holds them all. The peak of the process's resident memory must not exceed
the budgets + the rest of the model + caches + 10 %. Ends with 1 if something differs or is exceeded.
"""

import argparse, json, os, pathlib, random, subprocess, sys, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "target/release/lite-llm"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--shares", default="100,50,25,10")
    parser.add_argument("--workers", default="1,3")
    parser.add_argument("--nvme", help="a folder for a disk cache of half of the experts")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--greedy", type=int, default=16)
    parser.add_argument("--kv", type=int, default=64 << 20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="lite-llm-budget-")
    tokens, out = os.path.join(folder, "tokens.json"), os.path.join(folder, "out")
    about = json.loads(subprocess.check_output([options.binary, "inspect", options.model, "--json"]))
    pages = lambda tier: -(-tier["expert_bytes"] // 4096) * 4096
    number = lambda tier: tier["groups"] * tier["experts_per_group"] * about["sparse_layers"]
    experts = sum(number(tier) * pages(tier) for tier in about["tiers"] if tier["here"])
    largest = max(map(pages, about["tiers"]))
    # The rest of the model: all of it but experts.
    dense = about["bytes"] - sum(number(tier) * tier["expert_bytes"] for tier in about["tiers"] if tier["here"])
    vocab = about["vocab"]
    draw = random.Random(options.seed)
    prompts = [[draw.randrange(vocab) for _ in range(options.length)] for _ in range(options.prompts)]
    json.dump({"prompts": prompts}, open(tokens, "w"))
    expected, bad = None, 0
    print(f"{'workers':>7} {'memory for experts':>22} {'seconds':>8} {'peak':>10} {'allowed':>10}  bits")
    for workers in map(int, options.workers.split(",")):
        for share in map(int, options.shares.split(",")):
            dram = max(experts * share // 100 // workers, 8 * largest)
            command = [options.binary, "eval", "--model", options.model, "--tokens", tokens, "--out", out,
                       "--greedy", str(options.greedy), "--workers", str(workers), "--dram", str(dram),
                       "--kv", str(options.kv), "--threads", "2" if workers == 1 else "1"]
            if options.nvme:
                command += ["--nvme", f"{options.nvme}:{experts // 2}"]
            began = time.time()
            child = subprocess.Popen(command)
            _, status, usage = os.wait4(child.pid, 0)
            took, peak = time.time() - began, usage.ru_maxrss << 10
            allowed = int(1.1 * (min(dram, experts) * workers + (dense + options.kv) * workers))
            written = open(out, "rb").read() if status == 0 else None
            expected = expected or written
            same = written is not None and written == expected
            bad += not same or peak > allowed
            print(f"{workers:>7} {share:>6} % {dram / 2**20:>9.1f} MiB {took:>8.1f} {peak / 2**20:>6.0f} MiB "
                  f"{allowed / 2**20:>6.0f} MiB  {'equal' if same else 'DIFFER'}", flush=True)
    sys.exit(1 if bad else 0)


main()
