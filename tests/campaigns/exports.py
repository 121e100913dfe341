#!/usr/bin/env python3
"""Exports models, loads them with transformers, and compares logits.

    python3 -m venv target/hf && target/hf/bin/pip install torch==2.15.0 transformers==5.23.0
    target/hf/bin/python tests/campaigns/exports.py [HF_REFS_DIR]

Of each Hugging Face folder in HF_REFS_DIR whose class `export` knows, and of models of our own:

    again    import, export: transformers computes the same logits, bit for bit, from it as from the original
    trained  import, train a few steps, export: transformers' logits are those of `lite-llm eval`
    new      models that were never a Hugging Face folder: random values, trained here, exported

In f32. Prints a table; exit code 1 if logits differ by more than --tolerance anywhere, bits in `again`, a tensor that
transformers misses or does not know, or the text that a prompt becomes.
"""

import argparse, json, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"]
STEPS, SEQUENCE = 12, 32
# What tells classes apart in a model that begins here.
NEW = {
    "MixtralForCausalLM": 'qk_norm = "none"\nrenormalize = true',
    "OlmoeForCausalLM": 'qk_norm = "whole"\nrenormalize = false',
    "Qwen3MoeForCausalLM": 'qk_norm = "per_head"\nrenormalize = true\ntied_embeddings = true',
}


def lite_llm(*arguments):
    done = subprocess.run([OPTIONS.program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"lite-llm {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def ours(model, prompts, work):
    """Logits of every position of every prompt."""
    (work / "tokens.json").write_text(json.dumps({"prompts": prompts}))
    lite_llm("eval", "--model", model, "--tokens", work / "tokens.json", "--out", work / "logits.safetensors")
    found = load_file(work / "logits.safetensors")
    return [found[f"p{i}.logits"][: len(prompt)] for i, prompt in enumerate(prompts)]


def theirs(folder, prompts):
    """The same by transformers, the class, and tensors that it misses or does not know."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    model.eval()
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    return logits, type(model).__name__, wrong


def difference(left, right):
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def train(model, work):
    """Trains a few steps on this project's own documentation. Everything is trained; no loss but cross-entropy."""
    config = work / "train.toml"
    config.write_text(
        f'out = "run"\n{model}\n[data]\nfiles = ["{ROOT}/docs/GUIDE.md"]\nsequence = {SEQUENCE}\nbatch = 4\n'
        f'[starvation]\nrho = 0.0\n[[phase]]\nname = "all"\ntrain = {{ backbone = true, tiers = ["all"] }}\n'
        f"steps = {STEPS}\nlr = 1e-2\n")
    lite_llm("train", config)
    losses = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    losses = [event["ce"] for event in losses if event["event"] == "step"]
    return work / "run/model", f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


class Table:
    def __init__(self):
        self.missed = False
        print(f"{'model':34} {'class':22} {'ours - theirs':>14} {'largest':>8} {'greedy':>7}  what else")

    def row(self, name, cls, logits, reference, notes, exact=None):
        """`exact`: what transformers computed from the original."""
        apart, largest = difference(logits, reference), max(float(np.abs(l).max()) for l in reference)
        same = all((a.argmax(-1) == b.argmax(-1)).all() for a, b in zip(logits, reference))
        bad = [note for note in notes if note.startswith("!")]
        if exact is not None:
            equal = all(np.array_equal(a, b) for a, b in zip(reference, exact))
            notes.append("theirs: the original's bits" if equal else "! theirs: not the original's bits")
            bad += [] if equal else ["!"]
        missed = bool(bad) or not same or apart > OPTIONS.tolerance * max(largest, 1.0)
        self.missed |= missed
        print(f"{name:34} {cls:22} {apart:14.1e} {largest:8.2f} {'same' if same else 'OTHER':>7}  "
              f"{'MISSED ' if missed else ''}{'; '.join(notes)}", flush=True)


def check(table, name, checkpoint, cls, prompts, work, notes, original=None):
    """Exports a checkpoint and compares: with ours, and with what transformers says of the original."""
    out = work / "out"
    lite_llm("export", checkpoint, out)
    reference, found, wrong = theirs(out, prompts)
    if found != cls:
        notes.append(f"! {found}, not {cls}")
    if wrong:
        notes.append(f"! tensors: {wrong[:3]}")
    notes += text(checkpoint, out)
    exact = None if original is None else theirs(original, prompts)[0]
    table.row(name, found, ours(checkpoint, prompts, work), reference, notes, exact)


def text(checkpoint, out):
    """Whether both make the same tokens of a text."""
    words = "This License applies, as it is: to 3 files.\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    expected = tokenizer(words, add_special_tokens=False)["input_ids"]
    found = json.loads(lite_llm("--json", "tokenize", "--model", checkpoint, words))
    found = found.get("ids", found.get("tokens"))
    found = [token["id"] if isinstance(token, dict) else token for token in found]
    # Ours puts the model's first token in front, where it has one.
    same = found == expected or found[1:] == expected
    return [] if same else [f"! tokens: {found[:6]} beside {expected[:6]}"]


def main():
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    table, refs = Table(), []
    for folder in sorted(Path(OPTIONS.refs).iterdir()):
        if not (folder / "config.json").exists():
            continue
        cls = json.loads((folder / "config.json").read_text())["architectures"][0]
        if cls in CLASSES:
            refs.append((folder, cls))
    for folder, cls in refs:
        ids = load_file(folder / "refs.safetensors")
        prompts = [ids[key].tolist() for key in ("p0.input_ids", "p1.input_ids")]
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            lite_llm("import", folder, work / "first")
            check(table, f"{folder.name} again", work / "first", cls, prompts, work, [], folder)
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            lite_llm("import", folder, work / "first", "--dtype", "f32")
            model, losses = train(f'[model]\nfrom = "{work}/first"', work)
            check(table, f"{folder.name} trained", model, cls, prompts, work, [losses])
    vocabulary = 2048
    prompts = np.random.default_rng(1).integers(1, vocabulary, (2, 24)).tolist()
    for cls, keys in NEW.items():
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            model, losses = train(
                f'[model.new]\ntokenizer = "{ROOT}/models/manpages-moe"\nhidden = 64\nlayers = 2\nheads = 4\nkv_heads = 2\n'
                f"head_dim = 16\ncontext = 64\nintermediate = 48\nroutes = [1, 1, 2]\n{keys}\n"
                f'tiers = [{{ name = "tier_1b", groups = 1, experts = 8 }}]', work)
            check(table, "new", model, cls, prompts, work, [losses])
    missing = set(CLASSES) - {cls for _, cls in refs}
    if missing:
        print(f"MISSED: no folder of {', '.join(sorted(missing))} in {OPTIONS.refs}")
    return 1 if table.missed or missing else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("refs", nargs="?", default=ROOT / "tests/data/hf-refs",
                        help="folder of Hugging Face folders with refs.safetensors [default: tests/data/hf-refs]")
    parser.add_argument("--program", default=ROOT / "target/release/lite-llm")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="of the largest logit")
    OPTIONS = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(main())
