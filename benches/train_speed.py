#!/usr/bin/env python3
"""Training speed of lite-llm beside PyTorch: same shapes, same machine, taking turns.

  benches/train_speed.py --lite-llm FILE --torch PYTHON --script bench_train_torch.py --manpages CONFIG.json
                         [--rounds 4] [--threads 2] [--only TEXT] [--steps 7] [--out FILE.json]

PYTHON has torch and transformers; the script is ../shared/peers/bench_train_torch.py, and CONFIG.json that of
manpages-moe in Hugging Face's form. Both train in f32 with AdamW on random weights and tokens, one micro-batch
per step, and give tokens/s of the median step and the peak of their own process's memory.

One round runs each program once for each row, ours first in even rounds; the table has the medians of the rounds, the ratio
of the medians, the largest peak, and the CPUs that other programs used meanwhile (a quiet machine shows 0.0). The ratios
asked are 1.5 on the manual pages' shape and 1.25 on OLMoE-mini.
"""
import argparse, json, os, statistics, sys

from timed import timed

ROWS = [("manpages", "8x128", "qwen3_moe", 1.5), ("manpages", "2x512", "qwen3_moe", 1.5), ("mini", "8x128", "olmoe", 1.25)]


def ours(a, shape, batch, cls):
    command = [a.lite_llm, "bench", "train", "--shape", shape, "--batch", batch, "--json"]
    out, others = timed(command + ["--threads", str(a.threads), "--steps", str(a.steps)])
    found = json.loads(out.strip().splitlines()[-1])
    return found["tokens_per_second"]["median"], (found["peak_bytes"] or 0) >> 20, found["seconds"], others


def torch(a, shape, batch, cls):
    row = dict(cls=cls, shape=shape, batch=batch, experts="grouped_mm", variant="")
    command = [a.torch, a.script, "--out", os.devnull, "--manpages", a.manpages, "--row", json.dumps(row)]
    out, others = timed(command + ["--threads", str(a.threads), "--steps", str(a.steps)])
    found = json.loads(out.strip().splitlines()[-1])
    return found["tokens_per_s"], found["peak_rss_mb"], found["seconds"], others


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--lite-llm", "--torch", "--script", "--manpages"):
        ap.add_argument(name, required=True)
    ap.add_argument("--rounds", type=int, default=4); ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--only", default=""); ap.add_argument("--steps", type=int, default=7)
    ap.add_argument("--out")
    a = ap.parse_args()
    rows = [r for r in ROWS if a.only in f"{r[0]} {r[1]}"]
    found = {r: ([], []) for r in rows}
    for turn in range(a.rounds):
        for r in rows:
            programs = list(enumerate((ours, torch)))
            for i, program in programs if turn % 2 == 0 else programs[::-1]:
                one = program(a, *r[:3])
                found[r][i].append(one)
                print(f"round {turn + 1}, {r[0]} {r[1]}, {program.__name__}: {one[0]:.0f} tokens/s, others {one[3]:.2f}",
                      file=sys.stderr, flush=True)
    if a.out:
        json.dump({f"{r[0]} {r[1]}": dict(ours=o, torch=t) for r, (o, t) in found.items()}, open(a.out, "w"), indent=1)
    print("| shape | batch | ours, tokens/s | torch | ratio | asked | ours: forward, backward, optimizer | torch | peak MB, ours | torch | others |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r, (o, t) in found.items():
        m = lambda of: statistics.median(x[0] for x in of)
        span = lambda of: f"{m(of):.0f} ({min(x[0] for x in of):.0f}–{max(x[0] for x in of):.0f})"
        parts = lambda of: ", ".join(f"{statistics.median(x[2][k] for x in of):.3f}" for k in ("forward", "backward", "optimizer"))
        print(f"| {r[0]} | {r[1]} | {span(o)} | {span(t)} | {m(o) / m(t):.2f} | {r[3]} | {parts(o)} s | {parts(t)} s "
              f"| {max(x[1] for x in o)} | {max(x[1] for x in t)} | {max(x[3] for x in o + t):.2f} |")


if __name__ == "__main__":
    main()
