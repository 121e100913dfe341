#!/usr/bin/env python3
"""What `lite-llm plan` predicts beside what is measured: tokens/s of decode, and the time to the first token.

    python3 tests/campaigns/plan.py [--hf DIR] [--work DIR] [--dtypes int8,bf16] [--shares 1,.5,.25,.1]

A random model (of --shape, or a Hugging Face folder) in each format, with room in memory for each share of its experts.
Two predictions: with uniform routing, and with the recorded routing of random tokens and of what the model goes on
with, which is what is measured, with other tokens. Predicting and measuring take turns; --runs of each, the median
counts. Prints a table, predicted beside measured and their ratio, and one line of JSON; exit code 1 if a prediction with the recorded routing is more than --within off.
"""

import argparse, json, os, pathlib, random, statistics, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def call(options, *args):
    """The JSON that a command prints."""
    command = [options.binary, *map(str, args), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


def models(options):
    """The model in each format, made if it is not there."""
    work = pathlib.Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    hf = pathlib.Path(options.hf) if options.hf else work / f"{options.shape}-hf"
    if not (hf / "config.json").exists():
        call(options, "bench", "random-model", hf, "--shape", options.shape)
    for dtype in options.dtypes.split(","):
        model = work / f"{hf.name}-{dtype}"
        if not list(model.glob("manifest.*.json")):
            call(options, "import", hf, model, "--dtype", dtype)
        yield dtype, model


def trace(options, model, vocab):
    """The routing of random tokens, as many as are measured."""
    out, tokens = pathlib.Path(f"{model}.trace"), pathlib.Path(f"{model}.tokens.json")
    if not out.exists():
        draw = random.Random(options.seed)
        tokens.write_text(json.dumps({"prompts": [[draw.randrange(vocab) for _ in range(options.prompt)]]}))
        # What is generated is routed as it will be: greedy continuations, then read again.
        greedy = f"{model}.greedy"
        call(options, "eval", "--model", model, "--tokens", tokens, "--out", greedy, "--greedy", options.tokens)
        text = json.loads(tokens.read_text())["prompts"][0] + greedy_ids(greedy)
        tokens.write_text(json.dumps({"prompts": [text]}))
        call(options, "eval", "--model", model, "--tokens", tokens, "--trace", out)
        os.remove(greedy)
    return out


def greedy_ids(path):
    """The tensor p0.greedy_ids of a safetensors file."""
    data = open(path, "rb").read()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:8 + length])["p0.greedy_ids"]["data_offsets"]
    ids = data[8 + length + begin:8 + length + end]
    return [int.from_bytes(ids[at:at + 4], "little", signed=True) for at in range(0, len(ids), 4)]


def setting(options, model, path, dram):
    """Predicted and measured tokens/s, and seconds to the first token."""
    how = ["--model", model, "--dram", dram]
    plan = ["plan", *how, "--prompt-tokens", options.prompt, "--tokens", options.tokens]
    bench = [*how, "--cluster-only", "--prompt", options.prompt, "--runs", 1]
    seen = {"uniform": [], "traced": [], "measured": [], "first predicted": [], "first measured": [], "bound": ""}
    for _ in range(options.runs):
        seen["uniform"].append(call(options, *plan)["tokens_per_second"])
        traced = call(options, *plan, "--trace", path)
        seen["traced"].append(traced["tokens_per_second"])
        seen["first predicted"].append(traced["first_token_seconds"])
        seen["bound"], seen["hit_rate"] = traced["bound"], traced["hit_rate"]
        decode = call(options, "bench", "decode", *bench, "--generate", options.tokens)
        seen["measured"].append(decode["cluster_tokens_per_second"]["median"])
        prefill = call(options, "bench", "prefill", *bench)
        seen["first measured"].append(options.prompt / prefill["cluster_tokens_per_second"]["median"])
    return {key: statistics.median(value) if isinstance(value, list) else value for key, value in seen.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "target/release/lite-llm"))
    parser.add_argument("--work", default="/tmp/lite-llm-plan")
    parser.add_argument("--hf", help="a Hugging Face folder instead of a random model")
    parser.add_argument("--shape", default="olmoe-mini")
    parser.add_argument("--dtypes", default="int8,bf16")
    parser.add_argument("--shares", default="1,0.5,0.25,0.1")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=0.2)
    options = parser.parse_args()

    heading = ("setting", "uniform", "traced", "measured", "ratio", "hits", "first: predicted", "measured", "bound")
    line = "{:<12} {:>8} {:>8} {:>9} {:>6} {:>5} {:>17} {:>9}  {}"
    print(line.format(*heading))
    rows, worst = [], 0.0
    for dtype, model in models(options):
        summary = call(options, "inspect", model)
        tiers = summary["tiers"]
        experts = sum(t["groups"] * t["experts_per_group"] * -(-t["expert_bytes"] // 4096) * 4096 for t in tiers)
        experts *= summary["sparse_layers"]
        path = trace(options, model, summary["vocab"])
        for share in map(float, options.shares.split(",")):
            seen = setting(options, model, path, int(experts * share))
            ratio = seen["traced"] / seen["measured"]
            worst = max(worst, abs(ratio - 1))
            print(line.format(
                f"{dtype} {share:.0%}", f"{seen['uniform']:.2f}", f"{seen['traced']:.2f}",
                f"{seen['measured']:.2f}", f"{ratio:.2f}", f"{seen['hit_rate']:.2f}",
                f"{seen['first predicted']:.3f} s", f"{seen['first measured']:.3f} s", seen["bound"]), flush=True)
            rows.append({"dtype": dtype, "share": share, "ratio": ratio, **seen})
    print(json.dumps({"settings": rows, "worst": worst, "within": options.within}))
    sys.exit(0 if worst <= options.within else 1)


if __name__ == "__main__":
    main()
