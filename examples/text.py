#!/usr/bin/env python3
"""Makes the text that examples/grow.toml trains on: what Rust crates say of themselves.

    python3 examples/text.py examples/docs.jsonl        # then: zstd -19 --rm examples/docs.jsonl

The crates are those of Cargo.lock that are named below; `cargo fetch --locked` brings them. One line of JSON for each
source file with documentation: its comments (`///` and `//!`), and each README and licence. Comments that were there
before are left out, so that text which is held out is not text that was trained on. The order is that of names; the
same crates give the same bytes on every machine.

Why this text: it is English prose of one kind, some millions of words; it is on every machine that builds this project;
and all of it may be copied, under MIT, Apache-2.0, BSD, Unicode-3.0 or Zlib (`cargo deny` refuses others), whose texts
with their copyright lines are part of it.
"""

import json, os, re, sys
from pathlib import Path

CRATES = """
aho-corasick arc-swap axum base64 bytemuck bytes cc chrono clap clap_builder compact_str criterion crossbeam-channel
crossbeam-epoch crossbeam-utils data-encoding fancy-regex futures-util h2 half hashbrown http hyper hyper-util
indexmap indicatif itertools libloading lock_api log memchr memmap2 minijinja mio nom num-traits object_store
opentelemetry opentelemetry_sdk petgraph prometheus proptest quinn quinn-proto ractor rand rayon rayon-core rcgen redb
regex regex-automata regex-syntax reqwest rkyv rustls safetensors serde serde_json socket2 spin syn tempfile time
tokenizers tokio tokio-stream tokio-util toml_edit tonic tower tower-http tracing tracing-core tracing-subscriber url
winnow zerocopy zstd
""".split()
COMMENT = re.compile(r"\s*//[/!](?!/) ?(.*)")
SHORTEST = 200


def blocks(text):
    """The documentation comments of a source file, each as one text."""
    lines = []
    for line in [*text.splitlines(), ""]:
        if found := COMMENT.match(line):
            lines.append(found[1].rstrip())
        elif lines:
            yield "\n".join(lines).strip()
            lines = []


def versions(lock):
    """Version of each crate: the highest where there are several."""
    found = {}
    for name, version in re.findall(r'name = "(.+)"\nversion = "(.+)"', lock):
        key = [int(n) if n.isdigit() else 0 for n in re.split(r"[.+-]", version)]
        found[name] = max(found.get(name, ([], "")), (key, version))
    return {name: version for name, (_, version) in found.items()}


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    known = versions((Path(__file__).parent.parent / "Cargo.lock").read_text(encoding="utf-8"))
    seen, documents = set(), []

    def add(paragraphs):
        new = [text for text in paragraphs if text and text not in seen]
        seen.update(new)
        text = "\n\n".join(new)
        if len(text) >= SHORTEST:
            documents.append(text + "\n")

    for crate in CRATES:
        name = f"{crate}-{known[crate]}"
        folders = sorted(home.glob(f"registry/src/*/{name}"))
        if not folders:
            sys.exit(f"{home}/registry/src/*/{name} is not there: run `cargo fetch --locked` first")
        files = sorted(path for path in folders[0].rglob("*") if path.is_file())
        for path in files:
            if re.match(r"(README|LICEN[CS]E|COPYING|COPYRIGHT|UNLICENSE)", path.name) and path.suffix in ("", ".md", ".txt"):
                add([read(path).strip()])
        for path in files:
            if path.suffix == ".rs":
                add(blocks(read(path)))
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    size = sum(len(text.encode()) for text in documents)
    print(f"{len(documents)} documents of {len(CRATES)} crates, {size / 1e6:.1f} MB of text")


main()
