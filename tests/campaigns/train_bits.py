#!/usr/bin/env python3
"""Trains one model in many layouts, each in processes of its own, and compares the bits.

    python3 tests/campaigns/train_bits.py [--steps 100] [--binary target/release/lite-llm] [--seed 1] [--only REGEX]

The shape is the built-in model's (hidden 192, 5 layers), with a second tier that is added on the way; the text is the
project's own pages. Losses of all steps and the model's files have to be equal over numbers of workers, threads,
instruction sets, micro-batches, and layers that are computed again; and for runs of which a process is killed with
-9 at random moments, five times, and which then go on. Needs nothing but Python. Prints one line of JSON; exit
code 1 if a bit differs.
"""

import argparse, hashlib, json, os, pathlib, random, re, signal, subprocess, sys, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
out = "{out}"
seed = 7
[model.new]
tokenizer = "{root}/models/manpages-moe"
hidden = 192
layers = 5
heads = 6
kv_heads = 2
head_dim = 32
context = 256
intermediate = 128
tied_embeddings = true
qk_norm = "per_head"
routes = [1, 1, 2]
renormalize = true
tiers = [{{ name = "tier_1b", groups = 1, experts = 16 }}]
[data]
files = ["{root}/docs/*.md", "{root}/*.md"]
sequence = 64
batch = 8
held_out = 0.05
evaluate_every = 20
[checkpoint]
every = 7
[compute]
micro_rows = {micro}
recompute = "{recompute}"
[starvation]
rho = 0.5
[[phase]]
name = "0"
tiers = "..tier_1b"
train = {{ backbone = true, tiers = ["tier_1b"] }}
balance = {{ expert = 0.01 }}
steps = {first}
lr = 2e-3
warmup = 5
[[phase]]
name = "1"
add = {{ name = "tier_10b", groups = 2, experts = 8, init = "copy:tier_1b", k_tier = 2 }}
tiers = "all"
train = {{ backbone = true, tiers = ["all"], gates = true }}
balance = {{ tier = 0.01, group = 0.01, expert = 0.01 }}
pull = 1e-4
steps = {second}
lr = 1e-3
"""


def config(folder, name, steps, micro=0, recompute="none"):
    path = folder / f"{name}.toml"
    first = steps // 2
    path.write_text(CONFIG.format(out=name, root=ROOT, micro=micro, recompute=recompute, first=first, second=steps - first))
    return path


def bits(run):
    """Losses by step, and a hash of the model."""
    losses = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # A line that a kill tore.
        if event.get("event") == "step":
            before = losses.setdefault(event["step"], event["total"])
            if before != event["total"]:
                losses[event["step"]] = "differs when it is done again"
        if event.get("event") == "evaluated":
            losses["held out", event["step"]] = event["held_out"]
    model = hashlib.sha256()
    for path in sorted((run / "model").rglob("*")):
        if path.is_file():
            model.update(path.relative_to(run).as_posix().encode() + path.read_bytes())
    return losses, model.hexdigest()


def children(pid):
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def train(binary, path, flags, kills, rng):
    """Runs to the end; with kills, a process of the run is killed so often. Says how often, and how long it took."""
    begun, done, resume = time.monotonic(), 0, []
    while True:
        command = [binary, "train", path, *flags, *resume]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done < kills:
            time.sleep(rng.uniform(0.3, 4))
            victim = rng.choice([run.pid, *children(run.pid)])
            if run.poll() is None:
                os.kill(victim, signal.SIGKILL)
                done += 1
            if victim != run.pid and done < kills:
                time.sleep(rng.uniform(2, 6))
                if run.poll() is None:
                    run.kill()
                    done += 1
        said = run.communicate(timeout=1800)[1]
        if run.returncode == 0:
            return done, time.monotonic() - begun
        if run.returncode != -signal.SIGKILL:
            sys.exit(f"{path}: exit code {run.returncode}: {said[-2000:]}")
        resume = ["--resume"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--binary", default=ROOT / "target/release/lite-llm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="layouts whose names match, beside the first")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    layouts = [("alone", [], {}, 0)]
    layouts += [(f"{n} workers", ["--workers", str(n)], {}, 0) for n in (1, 2, 3, 5)]
    layouts += [(f"{n} threads", ["--threads", str(n)], {}, 0) for n in (1, 3)]
    layouts += [(f"simd {simd}", ["--simd", simd], {}, 0) for simd in ("scalar", "avx2")]
    layouts += [(f"{n} rows", [], {"micro": n}, 0) for n in (1, 2)]
    layouts += [("recompute", ["--threads", "2"], {"recompute": "layer"}, 0)]
    layouts += [("3 workers, 1 row, recompute", ["--workers", "3"], {"micro": 1, "recompute": "layer"}, 0)]
    layouts += [("killed", [], {}, 5), ("2 workers, killed", ["--workers", "2"], {}, 5)]
    layouts = layouts[:1] + [layout for layout in layouts[1:] if re.search(args.only, layout[0])]
    seconds, killed, differ = {}, 0, []
    with tempfile.TemporaryDirectory(prefix="lite-llm-train-") as folder:
        folder = pathlib.Path(folder)
        for number, (name, flags, settings, kills) in enumerate(layouts):
            path = config(folder, f"run{number}", args.steps, **settings)
            done, seconds[name] = train(args.binary, path, flags, kills, rng)
            killed += done
            found = bits(folder / f"run{number}")
            if number == 0:
                expected = found
                assert len([step for step in found[0] if isinstance(step, int)]) == args.steps, found[0]
            elif found != expected:
                differ.append(name)
            print(f"{name}: {seconds[name]:.1f} s, {'equal' if found == expected else 'DIFFERS'}", file=sys.stderr, flush=True)
    seconds = {name: round(of, 1) for name, of in seconds.items()}
    print(json.dumps({"steps": args.steps, "layouts": len(layouts), "killed": killed, "differ": differ, "seconds": seconds}))
    sys.exit(bool(differ))


main()
