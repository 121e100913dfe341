#!/usr/bin/env bash
# The GPU node's figures in one call on a machine with an NVIDIA GPU: decode and prefill of a model's shape with
# random weights, a memory that is too small, two GPUs where there are two, and a peer beside them.
#   benches/gpu.sh [--binary FILE] [--work DIR] [--shape NAME] [--formats "bf16 int8 int4"]
#                  [--routes FILE] [--peer FILE] [--test FILE]…
# FILE of --binary is a release build of lite-llm [target/release/lite-llm]; DIR takes the models (some 25 GB for
# OLMoE-1B-7B [/dev/shm/lite-llm-gpu]). --routes: recorded routes for `bench hbm`. --peer: bench_gpu.py, which needs
# PyTorch and transformers; it has the GPU to itself while the models are made, for PEER_SECONDS at most [300].
# --test: test binaries (`cargo test --test gpu --no-run`), which are run first; compute-sanitizer runs them once more
# if SANITIZE says which tests (a filter, `a_short_run`).
set -uo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
binary=$here/target/release/lite-llm work=/dev/shm/lite-llm-gpu shape=olmoe-1b-7b formats="bf16 int8 int4"
routes='' peer='' tests=()
while [ $# -gt 0 ]; do
    case $1 in
    --binary) binary=$2 ;; --work) work=$2 ;; --shape) shape=$2 ;; --formats) formats=$2 ;;
    --routes) routes=$2 ;; --peer) peer=$2 ;; --test) tests+=("$2") ;;
    *) echo "$1: no such option; see the head of $0" >&2; exit 2 ;;
    esac
    shift 2
done
# NVRTC: of the CUDA toolkit, or of the pip package nvidia-cuda-nvrtc.
for folder in /usr/local/cuda/lib64 $(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/nvidia/cu13/lib")' 2>/dev/null); do
    if compgen -G "$folder/libnvrtc.so*" >/dev/null; then LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}; fi
done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-} LITE_LLM_CACHE=${LITE_LLM_CACHE:-$work/cache}
mkdir -p "$work"
say() { printf '\n== %s (%ds)\n' "$*" "$SECONDS"; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

for test in ${tests[@]+"${tests[@]}"}; do
    say "$test"
    timeout 300 "$test" --test-threads 2 2>&1 | tail -n 40
    if [ -n "${SANITIZE:-}" ]; then
        for tool in memcheck racecheck; do
            say "compute-sanitizer $tool"
            timeout 200 compute-sanitizer --tool $tool --error-exitcode 9 "$test" --test-threads 1 $SANITIZE 2>&1 | tail -n 5
        done
    fi
done
peers=
if [ -n "$peer" ]; then
    say "the peer begins"
    PYTHONUNBUFFERED=1 timeout "${PEER_SECONDS:-300}" python3 "$peer" peer olmoe >"$work/peer.log" 2>&1 & peers=$!
fi
say "models"
"$binary" bench random-model --shape "$shape" "$work/hf" >"$work/made.log" 2>&1 || tail "$work/made.log"
made=
for format in $formats; do
    "$binary" import "$work/hf" "$work/$format" --dtype "$format" >"$work/import-$format.log" 2>&1 & made="$made $!"
done
# shellcheck disable=SC2086
wait $made
rm -rf "$work/hf"
if [ -n "$peers" ]; then
    wait "$peers"
    say "the peer"
    grep -v '"' "$work/peer.log" | tail -n 12
fi

device=cuda:0
bench() {
    local what=$1
    shift
    say "$device $what $*"
    timeout 120 "$binary" bench "$what" "$@" --device "$device" --kv-dtype bf16 --kv 12GiB 2>&1 | tail -n 6
}
steps="--prompt 448 --generate 128 --runs 3 --cluster-only"
for format in $formats; do
    for sequences in 1 8 64; do
        # shellcheck disable=SC2086
        bench decode --model "$work/$format" $steps --sequences $sequences
    done
    bench prefill --model "$work/$format" --prompt 2048 --runs 3 --cluster-only
done
for sequences in 1 8 64; do
    # shellcheck disable=SC2086
    bench decode --model "$work/bf16" $steps --sequences $sequences --math fast
done
bench prefill --model "$work/bf16" --prompt 2048 --runs 3 --cluster-only --math fast
if [ -n "$routes" ]; then bench hbm --model "$work/bf16" --routes "$routes" --hbm 3GiB --runs 2; fi
if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then
    device=cuda:0+1
    for sequences in 1 8 64; do
        # shellcheck disable=SC2086
        bench decode --model "$work/bf16" $steps --sequences $sequences
    done
    bench prefill --model "$work/bf16" --prompt 2048 --runs 3 --cluster-only
fi
say "done"
