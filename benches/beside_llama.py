#!/usr/bin/env python3
"""Decode and prefill of lite-llm beside llama.cpp: same weights, same machine, taking turns.

  benches/beside_llama.py --llama DIR --lite-llm FILE [--rounds 5] [--threads 2] [--out FILE.jsonl]
                          [--simd avx2] [--rpc] NAME=MODEL.gguf,CHECKPOINT ...

DIR holds llama-bench (and, for --rpc, ggml-rpc-server) of a llama.cpp that you have built. MODEL.gguf and
CHECKPOINT hold the same weights: `llama-quantize` makes Q8_0 and Q4_0 from what convert_hf_to_gguf.py wrote,
`lite-llm import --dtype int8|int4` from the same Hugging Face folder.

One round runs each program once: llama-bench -r 1, then `lite-llm bench ... --cluster-only --runs 1
--json` (a cluster of one worker; with --rpc two worker processes of one thread against two
ggml-rpc-servers of one thread). Both warm up before they measure. The medians of all rounds are
compared; "others" is the CPU time that other programs took meanwhile, in CPUs: a quiet machine
shows 0.0. --simd is what lite-llm computes with: give avx2 beside a llama.cpp that was built without
AVX-512, to see how both do on a machine that has none.
"""
import argparse, json, os, socket, statistics, subprocess, sys, time

from timed import timed


def llama(args, gguf, test, rpc):
    count = ["-p", str(args.prefill), "-n", "0"] if test == "prefill" else ["-p", "0", "-n", str(args.decode)]
    command = [os.path.join(args.llama, "llama-bench"), "-m", gguf, "-t", str(args.threads), "-r", "1", "-o", "json"]
    if rpc:
        command += ["--rpc", ",".join(address for _, address in rpc), "-ngl", "99"]
    out, others = timed(command + count, [server.pid for server, _ in rpc])
    return json.loads(out)[0]["avg_ts"], others


def ours(args, checkpoint, test, rpc):
    command = [args.lite_llm, "bench", test, "--model", checkpoint, "--cluster-only", "--runs", "1", "--json"]
    # llama-bench decodes from an empty context; the shortest prompt has one token.
    command += ["--prompt", str(args.prefill)] if test == "prefill" else ["--prompt", "1", "--generate", str(args.decode + 1)]
    command += ["--simd", args.simd] if args.simd else []
    command += ["--workers", "2", "--threads", "1", "--processes"] if rpc else ["--threads", str(args.threads)]
    out, others = timed(command)
    return json.loads(out)["cluster_tokens_per_second"]["median"], others


def start_servers(args):
    servers = []
    for _ in range(2 if args.rpc else 0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [os.path.join(args.llama, "ggml-rpc-server"), "-p", str(port), "-t", "1"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        servers.append((server, f"127.0.0.1:{port}"))
    time.sleep(1 if servers else 0)
    return servers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True)
    parser.add_argument("--lite-llm", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--simd")
    parser.add_argument("--rpc", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("pairs", nargs="+", metavar="NAME=GGUF,CHECKPOINT")
    args = parser.parse_args()
    rpc = start_servers(args)
    try:
        for pair in args.pairs:
            name, paths = pair.split("=", 1)
            gguf, checkpoint = paths.split(",", 1)
            for test in ("decode", "prefill"):
                samples = {"llama": [], "ours": []}
                others = []
                for _ in range(args.rounds):
                    for who, run, model in (("llama", llama, gguf), ("ours", ours, checkpoint)):
                        rate, other = run(args, model, test, rpc)
                        samples[who].append(round(rate, 2))
                        others.append(other)
                theirs, mine = (statistics.median(samples[who]) for who in ("llama", "ours"))
                label = f"{name}{', two processes' if rpc else ''}, {test}"
                print(f"{label:44} llama.cpp {theirs:8.1f}  lite-llm {mine:8.1f} tokens/s  ratio {mine / theirs:5.2f}"
                      f"  others {statistics.median(others):.1f}", flush=True)
                if args.out:
                    line = {"model": name, "processes": 2 if rpc else 1, "test": test, "ratio": mine / theirs,
                            "others": others, **samples}
                    with open(args.out, "a") as out:
                        out.write(json.dumps(line) + "\n")
    finally:
        for server, _ in rpc:
            server.kill()


main()
