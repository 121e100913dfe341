#!/usr/bin/env python3
"""Trains examples/grow.toml and examples/grow_alone.toml, and checks what is said of them.

    python3 tests/campaigns/grow.py                  # about 20 minutes on two cores
    python3 tests/campaigns/grow.py --only-read      # of runs that are there

Held out after phase 2, the model of two tiers is below what its first tier alone reaches in as many steps, on the same
text; no expert starves in the last half; the run takes 20 minutes at most. Prints tables; exit code 1 otherwise.
"""

import argparse, json, subprocess, sys, time, tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MINUTES, MEAN_OF = 20, 50


def read(run):
    """Steps, looks at what is held out, and seconds, of a run that was never interrupted or was."""
    steps, looks, seconds, before = {}, {}, 0.0, 0.0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "resumed":
            steps = {n: s for n, s in steps.items() if n <= event["step"]}
            looks = {n: s for n, s in looks.items() if n <= event["step"]}
            continue
        seconds += event["seconds"] - before if event["seconds"] >= before else event["seconds"]
        before = event["seconds"]
        if event["event"] == "step":
            steps[event["step"]] = event
        elif event["event"] == "evaluated":
            looks[event["step"]] = event
    return steps, looks, seconds


def mean(steps, key):
    return sum(step[key] for step in steps) / len(steps)


def report(name, run, seconds):
    steps, looks, counted = read(run)
    seconds = seconds or counted
    print(f"\n{name}: {len(steps)} steps, {sum(s['tokens'] for s in steps.values()) / 1e6:.2f} M tokens, {seconds / 60:.1f} minutes")
    print(f"{'phase':36} {'steps':>6} {'held out':>9}   {'balance (KL over tiers, groups, experts), before':>48}   {'after':>21}")
    phases = list(dict.fromkeys(step["phase"] for step in steps.values()))
    last = {}
    for phase in phases:
        within = [step for step in steps.values() if step["phase"] == phase]
        # The first step's gates are those that the phase began with.
        keys = ("kl_tier", "kl_group", "kl_expert")
        before, after = ([mean(of, key) for key in keys] for of in (within[:1], within[-MEAN_OF:]))
        last[phase] = looks[within[-1]["step"]]["held_out"]
        show = lambda values: " ".join(f"{value:7.4f}" for value in values)
        print(f"{phase:36} {len(within):6} {last[phase]:9.4f}   {show(before):>48}   {show(after)}")
    half = [step for n, step in steps.items() if n > len(steps) // 2]
    starved = max(tier["starved"] for step in half for tier in step["tiers"])
    print(f"experts without a token in the window, at most, in the last half: {starved}")
    return list(last.values())[-1], starved, seconds, len(steps)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only-read", action="store_true")
    parser.add_argument("--program", default=ROOT / "target/release/lite-llm")
    options = parser.parse_args()
    found = {}
    for name in ("grow", "grow_alone"):
        config, seconds = EXAMPLES / f"{name}.toml", None
        if not options.only_read:
            begun = time.time()
            if subprocess.run([options.program, "train", config], stdout=subprocess.DEVNULL).returncode != 0:
                return 1
            seconds = time.time() - begun
        found[name] = report(name, EXAMPLES / tomllib.loads(config.read_text())["out"], seconds)
    (grown, starved, seconds, steps), (alone, _, _, steps_alone) = found["grow"], found["grow_alone"]
    print(f"\nheld out: {grown:.4f} grown, {alone:.4f} alone: {alone - grown:.4f} nats below")
    wrong = [words for words, right in [
        ("the grown model is not below", grown < alone), ("experts starved", starved == 0),
        (f"more than {MINUTES} minutes", seconds <= 60 * MINUTES), ("not as many steps", steps == steps_alone)] if not right]
    print(f"MISSED: {', '.join(wrong)}" if wrong else "as claimed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
