#!/usr/bin/env bash
# Checks every CUDA kernel against the CPU's bits and times it, in one call on a machine with a GPU.
#   kernels/cuda/check.sh [--host] [BINARY] [check [small|products|experts|one|tiles|rows|steps|routes|attention|
#       fast|fast-products|fast-experts|fast-attention|
#       seam|descend|sample|sums|copies] [narrow|many]..] [time] [step [qwen3] [bf16|fast|int8|int4].. [prefill|decode]]
#       [link]
# BINARY is `cargo build -p lite-llm-kernels --example cuda_check` of a machine with Rust; without
# one it is built here. Kernels are read from this folder, so that they can be changed without it.
# --host: without a GPU. Kernels are compiled by g++ and run on the CPU by what lies in host/: slow
# (minutes to hours; name what to check), but their addresses, barriers and order of sums are theirs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
host=
if [ "${1:-}" = --host ]; then host=1; shift; fi
binary=
if [ $# -gt 0 ] && [ -x "$1" ]; then binary=$1; shift; fi
if [ -z "$binary" ]; then
    (cd "$here/../.." && cargo build -p lite-llm-kernels --example cuda_check)
    binary=$here/../../target/debug/examples/cuda_check
fi
cache=${TMPDIR:-/tmp}/lite-llm-cuda
if [ -n "$host" ]; then
    exec "$here/host/run.sh" "$binary" --sources "$here" --cache "$cache-host" "$@"
fi
# NVRTC: of the CUDA toolkit, or of the pip package nvidia-cuda-nvrtc.
for folder in /usr/local/cuda/lib64 $(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/nvidia/cu13/lib")' 2>/dev/null); do
    if compgen -G "$folder/libnvrtc.so*" >/dev/null; then LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}; fi
done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
exec "$binary" --sources "$here" --cache "$cache" "$@"
