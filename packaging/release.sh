#!/usr/bin/env bash
# Builds a release archive: lite-llm-VERSION-TARGET.tar.gz with the program, its man pages, completions, units and
# licences, and its SHA-256 beside it. The same sources, compiler and folders give the same
# archive.
#
#   packaging/release.sh [OUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
out="$(realpath -m "${1:-target/release-archive}")"
cargo build --release --locked
program="${CARGO_TARGET_DIR:-target}/release/lite-llm"
version="$("$program" --version | cut -d' ' -f2)"
target="$(rustc -vV | sed -n 's/^host: //p')"
name="lite-llm-$version-$target"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
folder="$work/$name"
mkdir -p "$folder/completions" "$folder/man" "$out"
install -m 755 "$program" "$folder/lite-llm"
strip "$folder/lite-llm" 2>/dev/null || true
for shell in bash zsh fish elvish powershell; do
  "$program" completions "$shell" >"$folder/completions/lite-llm.$shell"
done
"$program" man --out "$folder/man" >/dev/null
cp packaging/*.service packaging/lite-llm.toml README.md CHANGELOG.md LICENSE-* "$folder/"
cp -r docs ARCHITECTURE.md packaging/grafana.json "$folder/"
moment="$(git log -1 --format=%ct 2>/dev/null || date +%s)"
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$moment" -C "$work" -cf - "$name" |
  gzip -n9 >"$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$out/$name.tar.gz"
