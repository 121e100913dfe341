#!/usr/bin/env bash
# Runs a command as if there were two GPUs: kernels are compiled by g++ and run on the CPU by driver.cpp.
#   kernels/cuda/host/run.sh COMMAND…
# For checking, not for speed. Libraries and kernels are kept under target/host-gpu.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
made=$here/../../../target/host-gpu
mkdir -p "$made"
cp "$here"/*.h "$made"
for name in cuda.so.1:driver nvrtc.so.13:nvrtc; do
    to=$made/lib${name%:*}
    if [ ! "$to" -nt "$here/${name#*:}.cpp" ]; then
        g++ -std=c++20 -O2 -fPIC -shared "$here/${name#*:}.cpp" -o "$to" -ldl
    fi
done
export LD_LIBRARY_PATH=$made${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# What was compiled with other headers is of no use.
export LITE_LLM_CACHE=${LITE_LLM_CACHE:-$made/cache-$(cat "$here"/*.h | cksum | cut -d " " -f 1)}
exec "$@"
