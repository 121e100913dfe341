#!/usr/bin/env python3
"""Serving, measured: beside llama-server, in batches, with shared prefixes, and with guessed tokens.

  benches/serving.py prepare --work DIR --llama BUILD/bin [--python VENV/bin/python]      # once: the models
  benches/serving.py all     --work DIR --llama BUILD/bin [--rounds 3] [--quiet 60]       # on a quiet machine
  benches/serving.py throughput|batching|prefix|speculation --work DIR …                  # one of them
  … --quick                                                                               # tiny: does it run at all?

`prepare` makes OLMoE-mini with random weights (`peers/gen_olmoe.py`, which needs numpy, tokenizers and the gguf
package: those of --python), lets `llama-quantize` make Q8_0 of it, and imports that file, so that both programs
compute with the same integers. PEERS.md says how llama.cpp is built; `--llama` is the folder of its programs.
The peers' scripts are found through LITE_LLM_SHARED (or ../shared), or by --peers.

throughput   `peers/bench_server.py`, unmodified, against llama-server (32 slots, --threads) and `run --http`, taking
             turns, each time a fresh server; then against a coordinator with two worker processes of one thread each.
             Asked: 1.2 x its tokens/s with 8 and 32 clients, times to first tokens no worse.
batching     1 to 64 sequences at once, on the demo model and on the mini shape; each text is compared with the one
             that its request has alone, and once more with its log-probabilities.
prefix       two prompts that share --shared tokens: the second's time to its first token over the first's, with the
             answer of a server that has seen nothing before. Asked: 0.15. Neither another tenant nor another set of
             tiers finds what is not theirs.
speculation  `speculate: ngram` and without, in turns, one at a time, on copying (a passage of held-out text that was
             there before) and on held-out text, greedy and sampled; demo model and mini shape. Asked: 1.5 x on copying,
             nowhere below 0.97. Texts and log-probabilities are compared.

Prints tables, "others" being the CPUs that other programs took meanwhile (0.0 on a quiet machine), and lines of JSON
into --out. Exit code 1 where an answer differs from what it should be or a cache tells too much; never for a speed.
"""
import argparse, concurrent.futures, http.client, json, os, pathlib, random, re, shutil, socket, statistics
import subprocess, sys, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get("LITE_LLM_SHARED", ROOT.parent / "shared"))
VOCAB = 32000
BROKEN = []


def wrong(what):
    """A guarantee that was not kept."""
    BROKEN.append(what)
    print("BROKEN:", what, flush=True)


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


# The machine.


def ticks():
    v = [int(x) for x in open("/proc/stat").readline().split()[1:9]]
    return (sum(v) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")


def cpu(pids):
    seconds = 0
    for pid in pids:
        fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def wait_quiet(limit):
    """Until other programs took less than 0.08 CPU for two seconds, at most so long."""
    end = time.time() + limit
    while time.time() < end:
        before = ticks()
        time.sleep(2)
        if (ticks() - before) / 2 < 0.08:
            return


class Others:
    """The CPUs that other programs than this one and a server take meanwhile."""

    def __init__(self, server):
        self.pids = [os.getpid(), *server.pids]

    def __enter__(self):
        self.at, self.busy, self.own = time.time(), ticks(), cpu(self.pids)
        return self

    def __exit__(self, *_):
        self.seconds = time.time() - self.at
        self.cpus = max(0.0, (ticks() - self.busy - (cpu(self.pids) - self.own)) / self.seconds)


# Servers.


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """Processes of which one speaks HTTP on loopback; ended on leaving."""

    def __init__(self, commands, port, key=None):
        self.port, self.key = port, key
        self.log = tempfile.NamedTemporaryFile(prefix="serving-", suffix=".log", delete=False)
        start = lambda command: subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=self.log,
                                                 stderr=self.log)
        self.processes = []
        for command, wait in commands:
            end = time.time() + 60
            while wait and not os.path.exists(wait) and time.time() < end:
                time.sleep(0.05)
            self.processes.append(start(command))

    @property
    def pids(self):
        return [process.pid for process in self.processes]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        end, said = time.time() + 120, None
        while time.time() < end:
            if any(process.poll() is not None for process in self.processes):
                break
            try:
                if self.post(dict(prompt=[5, 6, 7], max_tokens=2, temperature=0))["choices"]:
                    return self
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                said = error
                time.sleep(0.2)
        codes = [process.poll() for process in self.processes]
        wrong(f"a server does not answer ({said!r}, {codes}): see {self.log.name}")
        self.__exit__()
        sys.exit(open(self.log.name).read()[-2000:])

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        if b"panicked" in open(self.log.name, "rb").read():
            wrong(f"a panic: see {self.log.name}")
        elif not BROKEN:
            os.unlink(self.log.name)

    def request(self, body, path="/v1/completions"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60 if body.get("max_tokens") == 2 else 900)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {reply.read()[:500]}")
        return connection, reply

    def post(self, body):
        connection, reply = self.request(body)
        said = reply.read()
        connection.close()
        return json.loads(said)

    def stream(self, body):
        """The text, its log-probabilities, tokens, and the seconds to the first of them and to the last."""
        began, first, last, parts, scores, tokens = time.time(), None, None, [], [], 0
        connection, reply = self.request({**body, "stream": True, "stream_options": {"include_usage": True}})
        for line in reply:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            for choice in event.get("choices", []):
                last = time.time()
                first = first or last
                parts.append(choice.get("text") or "")
                if choice.get("logprobs"):
                    scores.append(choice["logprobs"])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        connection.close()
        return {"text": "".join(parts), "scores": scores, "tokens": tokens, "first": first - began,
                "last": last - began}

    def metric(self, name):
        """Of all nodes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {self.key}"} if self.key else {})
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


def ours(options, model, threads=None):
    port = free_port()
    command = [options.binary, "run", "--model", model, "--http", f"127.0.0.1:{port}", "--http-model", "m",
               "--threads", threads or options.threads]
    return Server([(command, None)], port)


def two_workers(options, model, workers=2, keys=0):
    """A coordinator and worker processes of one thread each; of keys so many."""
    port, quic = free_port(), free_port()
    state = tempfile.mkdtemp(prefix="serving-state-")
    made = [json.loads(subprocess.run([options.binary, "key", "--state", state, "--json", "add", f"k{n}"], check=True,
                                      capture_output=True, text=True).stdout)["key"] for n in range(keys)]
    commands = [([options.binary, "coordinator", "--model", model, "--workers", workers, "--state", state, "--listen",
                  f"127.0.0.1:{quic}", "--http", f"127.0.0.1:{port}", "--http-model", "m"], None)]
    token = os.path.join(state, "worker.token")
    commands += [([options.binary, "worker", "--token", token, "--name", f"w{n}", "--threads", 1], token)
                 for n in range(workers)]
    server = Server(commands, port, made[0] if made else None)
    server.keys = made
    return server


def llama(options):
    port = free_port()
    room = -(-(options.prompt + options.gen + 8) // 64) * 64 * 32
    command = [os.path.join(options.llama, "llama-server"), "-m", options.gguf, "-t", options.threads, "-tb",
               options.threads, "-np", 32, "-c", room, "--host", "127.0.0.1", "--port", port]
    return Server([(command, None)], port)


# Models.


def prepare(options):
    """OLMoE-mini as GGUF Q8_0, the same integers as a checkpoint, and the demo model with a second tier."""
    work, python = pathlib.Path(options.work), options.python or sys.executable
    work.mkdir(parents=True, exist_ok=True)
    need = "import numpy, tokenizers, gguf"
    generate = [python, pathlib.Path(options.peers) / "gen_olmoe.py"]
    steps = [
        (work / "tok", [*generate, "tokenizer", "--vocab", VOCAB, "--out", work / "tok", "--text",
                        options.heldout, *sorted(pathlib.Path(options.peers).parent.glob("*.md")),
                        *sorted(ROOT.glob("**/src/**/*.rs"))]),
        (work / "mini-bf16.gguf", [*generate, "gguf", "--shape", "mini", "--tok", work / "tok", "--out",
                                   work / "mini-bf16.gguf"]),
        (pathlib.Path(options.gguf), [os.path.join(options.llama or "", "llama-quantize"), work / "mini-bf16.gguf",
                                      options.gguf, "Q8_0", 1]),
        (pathlib.Path(options.mini), [options.binary, "import", options.gguf, options.mini]),
    ]
    for made, command in steps:
        if made.exists():
            continue
        if command[0] == python and subprocess.run([python, "-c", need], capture_output=True).returncode:
            sys.exit(f"{python} lacks one of numpy, tokenizers and gguf: give --python (see PEERS.md)")
        if "llama-quantize" in str(command[0]) and not os.path.exists(command[0]):
            sys.exit("llama-quantize is not there: build llama.cpp as PEERS.md says, and give --llama")
        print(" ".join(map(str, command))[:200], flush=True)
        if subprocess.run(list(map(str, command))).returncode:
            sys.exit("that failed")
    tiered(options)


def tiered(options):
    """The demo model with another tier, whose experts are copies."""
    model = pathlib.Path(options.work) / "demo-tiers"
    if not model.exists():
        shutil.copytree(options.demo, model)
        os.system(f"chmod -R u+w '{model}'")
        add = ["tier", "add", model, "--name", "tier_10b", "--groups", 1, "--experts", 16, "--init", "random:1"]
        subprocess.run([options.binary, *map(str, add)], check=True)
    return model


# Throughput.


def client(options, server, clients, requests):
    """`bench_server.py` as it is, whose list of results is read when it has ended."""
    out = os.path.join(options.work, "bench_server.jsonl")
    call = ["bench_server.py", "--url", server.url, "--out", out, "--clients", clients, "--requests", requests,
            "--prompt", options.prompt, "--gen", options.gen, "--vocab", VOCAB, "--rounds", 1, "--quiet", options.quiet,
            "--pid", *server.pids]
    program = ("import json, runpy, sys; sys.argv = json.loads(sys.argv[1]); "
               "seen = runpy.run_path(sys.argv[0]); print('RESULT', json.dumps([seen['d'], seen['res']]))")
    call[0] = os.path.join(options.peers, "bench_server.py")
    command = [sys.executable, "-c", program, json.dumps(list(map(str, call)))]
    ran = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if ran.returncode or not lines:
        sys.exit(f"bench_server.py: {ran.stderr[-2000:]}")
    figures, results = json.loads(lines[0][7:])
    if len(results) != requests or any(result[2] != options.gen for result in results):
        wrong(f"{clients} clients: {len(results)} of {requests} answers, of "
              f"{sorted({result[2] for result in results})} tokens instead of {options.gen}")
    return figures["samples"][0], [result[0] for result in results], figures["others"]


def throughput(options):
    who = {"llama-server": lambda: llama(options)} if options.llama else {}
    who["one process"] = lambda: ours(options, options.mini)
    who["two workers"] = lambda: two_workers(options, options.mini)
    line = "{:>7} {:<13} {:>8} {:>6} {:>10} {:>10} {:>7}  {}"
    print(line.format("clients", "", "tokens/s", "ratio", "TTFT p50", "TTFT p99", "others", "tokens/s of each round"))
    for clients in options.clients:
        requests = 2 if options.quick else max(12, 3 * clients)
        seen = {name: ([], [], []) for name in who}
        for _ in range(options.rounds):
            for name, start in who.items():
                # A fresh one each time: the client asks the same again, and a cache of prefixes would know it.
                with start() as server:
                    rate, firsts, others = client(options, server, clients, requests)
                    if name != "llama-server" and server.metric("lite_llm_prefix_cache_hit_tokens_total"):
                        wrong("throughput: prompts were found in the cache, so that the comparison is none")
                seen[name][0].append(rate)
                seen[name][1].extend(firsts)
                seen[name][2].append(others)
        base = statistics.median(seen["llama-server"][0]) if "llama-server" in seen else None
        for name, (rates, firsts, others) in seen.items():
            rate = statistics.median(rates)
            figures = {"part": "throughput", "clients": clients, "who": name, "tokens_per_s": rate,
                       "ratio": base and round(rate / base, 3), "ttft_p50": round(quantile(firsts, 0.5), 3),
                       "ttft_p99": round(quantile(firsts, 0.99), 3), "others": statistics.median(others),
                       "rates": rates, "requests": requests, "prompt": options.prompt, "gen": options.gen}
            print(line.format(clients, name, f"{rate:.1f}", f"{rate / base:.2f}" if base else "-",
                              f"{figures['ttft_p50']} s", f"{figures['ttft_p99']} s", figures["others"], rates),
                  flush=True)
            record(options, figures)


# Batching.


def batching(options):
    line = "{:<5} {:>9} {:>9} {:>8} {:>10} {:>7} {:>8}"
    print(line.format("model", "sequences", "tokens/s", "times", "TTFT p50", "others", "differ"))
    for name, model, vocab in (("demo", options.demo, 2048), ("mini", options.mini, VOCAB)):
        most = max(options.sequences)
        dice = random.Random(11)
        asked = [dict(prompt=[dice.randrange(3, vocab) for _ in range(options.prompt)], max_tokens=options.gen, seed=n,
                      temperature=0.8 if n % 2 else 0, ignore_eos=True) for n in range(most)]
        scored = [{**body, "logprobs": 2} for body in asked]
        with ours(options, model) as server:
            alone = [server.stream(body) for body in asked]
        with ours(options, model) as server:
            alone_scored = [server.stream(body) for body in scored]
            together = at_once(server, scored)
        differ = sum((a["text"], a["scores"]) != (b["text"], b["scores"]) for a, b in zip(alone_scored, together))
        differ += sum(a["text"] != b["text"] for a, b in zip(alone, alone_scored))
        if differ:
            wrong(f"batching, {name}: {differ} of {most} answers with log-probabilities are not those alone")
        first = None
        for count in options.sequences:
            rates, firsts, others, changed = [], [], [], 0
            for _ in range(options.rounds):
                with ours(options, model) as server:
                    wait_quiet(options.quiet)
                    with Others(server) as watch:
                        answers = at_once(server, asked[:count])
                rates.append(sum(answer["tokens"] for answer in answers) / watch.seconds)
                firsts += [answer["first"] for answer in answers]
                others.append(watch.cpus)
                changed += sum(a["text"] != b["text"] for a, b in zip(answers, alone))
            rate = statistics.median(rates)
            first = first or rate
            print(line.format(name, count, f"{rate:.1f}", f"{rate / first:.2f}", f"{quantile(firsts, 0.5):.3f} s",
                              f"{statistics.median(others):.2f}", changed), flush=True)
            record(options, {"part": "batching", "model": name, "sequences": count, "tokens_per_s": round(rate, 1),
                             "rates": [round(rate, 1) for rate in rates], "ttft_p50": round(quantile(firsts, 0.5), 3),
                             "others": statistics.median(others), "changed": changed})
            if changed:
                wrong(f"batching, {name}: {changed} answers of {count} at once are not those alone")


def at_once(server, bodies):
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(server.stream, bodies))


# Prefixes.


def prefix(options):
    line = "{:<22} {:>10} {:>10} {:>6} {:>7} {:>6}"
    print(line.format("", "first TTFT", "second", "ratio", "others", "found"))
    dice, ratios, firsts, seconds, others, found = random.Random(5), [], [], [], [], 0
    ids = lambda count: [dice.randrange(3, VOCAB) for _ in range(count)]
    ask = lambda prompt: dict(prompt=prompt, max_tokens=8, temperature=0, ignore_eos=True, logprobs=2)
    rounds = [(ids(options.shared), ids(16), ids(16)) for _ in range(options.rounds)]
    fresh = []
    for shared, _, other in rounds:
        with ours(options, options.mini) as server:
            fresh.append(server.stream(ask(shared + other)))
    with ours(options, options.mini) as server:
        for (shared, one, other), expected in zip(rounds, fresh):
            wait_quiet(options.quiet)
            before = server.metric("lite_llm_prefix_cache_hit_tokens_total")
            with Others(server) as watch:
                first, second = server.stream(ask(shared + one)), server.stream(ask(shared + other))
            hits = server.metric("lite_llm_prefix_cache_hit_tokens_total") - before
            found = max(found, hits)
            firsts.append(first["first"])
            seconds.append(second["first"])
            ratios.append(second["first"] / first["first"])
            others.append(watch.cpus)
            if not hits:
                wrong("prefix: nothing was found in the cache")
            if (second["text"], second["scores"]) != (expected["text"], expected["scores"]):
                wrong("prefix: an answer whose prefix was found differs from one whose prefix was computed")
    median = statistics.median
    print(line.format(f"{options.shared} tokens shared", f"{median(firsts):.3f} s", f"{median(seconds):.3f} s",
                      f"{median(ratios):.3f}", f"{median(others):.2f}", int(found)), flush=True)
    record(options, {"part": "prefix", "shared": options.shared, "first": firsts, "second": seconds,
                     "ratio": median(ratios), "found": found, "others": median(others)})
    who_finds(options)


def who_finds(options):
    """Hits of whoever asks the same again: with the same key and tiers some, with others none."""
    model, dice = tiered(options), random.Random(6)
    prompt = [dice.randrange(3, 2000) for _ in range(300)]
    with two_workers(options, model, workers=1, keys=2) as server:
        one, other = server.keys

        def hits(key, tiers):
            before, server.key = server.metric("lite_llm_prefix_cache_hit_tokens_total"), key
            server.post(dict(prompt=prompt, max_tokens=1, tiers=tiers))
            return server.metric("lite_llm_prefix_cache_hit_tokens_total") - before

        asked = [(one, "all", False), (one, "all", True), (one, "tier_1b", False), (one, "tier_1b", True),
                 (other, "all", False), (other, "tier_1b", False), (other, "all", True), (one, "all", True)]
        for number, (key, tiers, finds) in enumerate(asked):
            seen = hits(key, tiers)
            print(f"  key {'one' if key == one else 'other'}, tiers {tiers:<8} finds {int(seen):>4} tokens", flush=True)
            if bool(seen) != finds:
                wrong(f"prefix: request {number} finds {int(seen)} tokens")


# Guessed tokens.


def speculation(options):
    text = open(options.heldout, encoding="utf-8").read()
    paragraphs = [line for line in text.splitlines() if len(line) > 300]
    dice = random.Random(3)
    chosen = dice.sample(paragraphs, 2 if options.quick else options.passages)
    # To copy: the passage twice, and how it begins once more.
    copying = [f"{part[:600]}\n\n{part[:600]}\n\n{part[:60]}" for part in chosen]
    heldout = [part[:250] for part in chosen]
    line = "{:<5} {:<18} {:>9} {:>9} {:>6} {:>6} {:>6} {:>9} {:>7} {:>7}"
    print(line.format("model", "task", "without", "with", "ratio", "least", "asked", "guessed", "right", "others"))
    for name, model in (("demo", options.demo), ("mini", options.mini)):
        for task, prompts, temperature in (("copying, greedy", copying, 0), ("copying, sampled", copying, 0.5),
                                           ("held out, greedy", heldout, 0), ("held out, sampled", heldout, 0.8)):
            with ours(options, model) as server:
                spec_task(options, server, name, task, prompts, temperature, line)


def spec_task(options, server, name, task, prompts, temperature, line):
    body = lambda prompt, **more: dict(prompt=prompt, max_tokens=options.copy, temperature=temperature, seed=7,
                                       ignore_eos=True, **more)
    # Bits first, which also brings prompts into the cache, for both alike.
    for prompt in prompts:
        plain, guessed = (server.stream(body(prompt, logprobs=2, **how)) for how in ({}, {"speculate": "ngram"}))
        if (plain["text"], flat(plain["scores"])) != (guessed["text"], flat(guessed["scores"])):
            wrong(f"speculation, {name}, {task}: text or log-probabilities differ")
    drafts = lambda: [server.metric(f"lite_llm_spec_decode_num_{what}_tokens_total") for what in ("draft", "accepted")]
    rates, others, before = {"off": [], "ngram": []}, [], drafts()
    for _ in range(options.rounds):
        wait_quiet(options.quiet)
        with Others(server) as watch:
            spent, texts = {"off": [0, 0.0], "ngram": [0, 0.0]}, {"off": [], "ngram": []}
            for number, prompt in enumerate(prompts):
                for how in (("off", "ngram") if number % 2 else ("ngram", "off")):
                    answer = server.stream(body(prompt, speculate=how))
                    spent[how][0] += answer["tokens"] - 1
                    spent[how][1] += answer["last"] - answer["first"]
                    texts[how].append(answer["text"])
        if texts["off"] != texts["ngram"]:
            wrong(f"speculation, {name}, {task}: texts differ")
        for how, (tokens, seconds) in spent.items():
            rates[how].append(tokens / seconds)
        others.append(watch.cpus)
    guessed, right = (after - was for after, was in zip(drafts(), before))
    without, with_ = (statistics.median(rates[how]) for how in ("off", "ngram"))
    ratios = [b / a for a, b in zip(rates["off"], rates["ngram"])]
    asked = 1.5 if task == "copying, greedy" and name == "demo" else 0.97
    print(line.format(name, task, f"{without:.1f}", f"{with_:.1f}", f"{statistics.median(ratios):.2f}",
                      f"{min(ratios):.2f}", asked, int(guessed), int(right), f"{statistics.median(others):.2f}"),
          flush=True)
    record(options, {"part": "speculation", "model": name, "task": task, "without": rates["off"],
                     "with": rates["ngram"], "ratio": statistics.median(ratios), "guessed": guessed, "right": right,
                     "others": statistics.median(others)})


def flat(scores):
    """Log-probabilities token by token, however many came at once."""
    return {field: [value for part in scores for value in part.get(field) or []]
            for field in ("tokens", "token_logprobs", "top_logprobs")}


def record(options, figures):
    with open(options.out, "a") as out:
        out.write(json.dumps({**figures, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}) + "\n")


PARTS = {"throughput": throughput, "batching": batching, "prefix": prefix, "speculation": speculation}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("part", choices=["prepare", "all", *PARTS])
    parser.add_argument("--binary", default=str(ROOT / "target/release/lite-llm"))
    parser.add_argument("--work", default="/tmp/lite-llm-serving")
    parser.add_argument("--llama", help="the folder of llama-server and llama-quantize; without, nothing is compared")
    parser.add_argument("--python", help="one that has numpy, tokenizers and gguf")
    parser.add_argument("--peers", default=str(SHARED / "peers"))
    parser.add_argument("--heldout", default=str(SHARED / "models/manpages-moe/heldout.txt"))
    parser.add_argument("--demo", default=str(ROOT / "models/manpages-moe"))
    parser.add_argument("--mini", help="a checkpoint of the mini shape [default: WORK/mini-int8]")
    parser.add_argument("--gguf", help="the same weights as Q8_0 [default: WORK/mini-q8_0.gguf]")
    parser.add_argument("--out", help="[default: WORK/serving.jsonl]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet", type=float, default=0, help="wait so many seconds at most for a quiet machine")
    parser.add_argument("--clients", type=numbers, default=[1, 8, 32])
    parser.add_argument("--sequences", type=numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--shared", type=int, default=1500, help="tokens of a shared prefix")
    parser.add_argument("--passages", type=int, default=6)
    parser.add_argument("--copy", type=int, default=200, help="tokens of answers with and without guessing")
    parser.add_argument("--quick", action="store_true", help="tiny, to see whether it runs; figures mean nothing")
    options = parser.parse_args()
    work = pathlib.Path(options.work)
    options.mini = options.mini or str(work / "mini-int8")
    options.gguf = options.gguf or str(work / "mini-q8_0.gguf")
    options.out = options.out or str(work / "serving.jsonl")
    if options.quick:
        options.rounds, options.clients, options.sequences = 1, [1, 2], [1, 4]
        options.gen, options.shared, options.copy, options.prompt = 8, 300, 40, 32
    if options.part == "prepare":
        return prepare(options)
    client_script = os.path.join(options.peers, "bench_server.py")
    for needed in (options.binary, options.mini, options.demo, options.heldout, client_script):
        if not os.path.exists(needed):
            sys.exit(f"{needed} is not there: `{sys.argv[0]} prepare --help` says how it is made")
    for name, part in PARTS.items():
        if options.part in (name, "all"):
            print(f"\n{name}", flush=True)
            part(options)
    sys.exit(1 if BROKEN else 0)


main()
