#!/usr/bin/env python3
"""Schemathesis against our own description: requests that fit it and requests that do not, and no answer of 5xx.

    python3 tests/campaigns/schemathesis.py [--examples 100] [--python VENV/bin/python]

Without --python it makes a virtual environment under target/ and installs schemathesis there (PyPI); where that
cannot be done it says so and skips. A coordinator and a worker are started, with a context of 64 tokens so that
answers end soon. A 504 of the caller's own `deadline_ms` is the answer that was asked for, and allowed; all other
statuses of 500 and more fail, as do answers whose type or shape the description does not have, a server that does not
answer, and a panic in its log. Prints a table of statuses by path and a line of JSON; exit code 1 if anything failed.
"""

import argparse, collections, json, os, re, subprocess, sys, urllib.request

import cluster as clusters

VERSION = "4.32.5"
CHECKS = "no_5xx,content_type_conformance,response_schema_conformance"
HOOKS = '''
import json, os
import schemathesis

# What the description says in words only: which fields are for which of the two ways to ask, and what goes together.
CHAT = ["messages", "tools", "tool_choice", "chat_template_kwargs", "max_completion_tokens", "top_logprobs"]
FORMS = ["response_format", "regex", "grammar", "tool_choice", "tools", "stream_options", "top_logprobs", "priority",
         "tiers"]

@schemathesis.hook
def before_call(context, case, kwargs):
    label, body = case.operation.label, case.body
    if not isinstance(body, dict) or "completions" not in label:
        return
    # Every other body of those that would be refused for one of these is made one that is not.
    chosen = len(json.dumps(body, default=str)) % 2
    drop = ["model", *(FORMS if chosen else []), *(["prompt"] if "chat" in label else CHAT if chosen else [])]
    case.body = {name: value for name, value in body.items() if name not in drop}
    if "chat" in label and chosen and isinstance(case.body.get("logprobs"), int):
        case.body["logprobs"] = bool(case.body["logprobs"])

@schemathesis.check
def no_5xx(ctx, response, case):
    with open(os.environ["STATUSES"], "a") as out:
        out.write(json.dumps([case.operation.label, response.status_code]) + "\\n")
    if response.status_code < 500:
        return
    said = response.text[:500]
    if response.status_code == 504 and '"deadline_exceeded"' in said:
        return
    raise AssertionError(f"{response.status_code}: {said}")
'''


def interpreter(options):
    """A Python that has schemathesis, or None."""
    if options.python:
        return options.python
    venv = clusters.ROOT / "target/schemathesis"
    python = venv / "bin/python"
    has = lambda: subprocess.run([python, "-m", "schemathesis.cli", "--version"], capture_output=True).returncode == 0
    if python.exists() and has():
        return python
    make = [[sys.executable, "-m", "venv", venv], [python, "-m", "pip", "install", "-q", f"schemathesis=={VERSION}"]]
    return python if all(subprocess.run(step).returncode == 0 for step in make) and has() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    clusters.arguments(parser, tokens=4)
    parser.set_defaults(workers=1, replicas=1, http=True, coordinator=["--context", "64"])
    parser.add_argument("--python", help="of an environment that has schemathesis")
    parser.add_argument("--examples", type=int, default=100, help="of each operation")
    parser.add_argument("--seconds", type=int, default=3600, help="at most")
    options = parser.parse_args()
    python = interpreter(options)
    if not python:
        print("skipped: schemathesis cannot be installed (PyPI cannot be reached?); give --python")
        return
    cluster = clusters.Cluster(options)
    broken, url = [], "http://%s:%d" % cluster.http
    try:
        if not cluster.ready(120):
            sys.exit(f"the cluster does not become ready; see {cluster.state}/log")
        hooks, statuses = os.path.join(cluster.state, "lite_hooks.py"), os.path.join(cluster.state, "statuses")
        open(hooks, "w").write(HOOKS)
        command = [python, "-m", "schemathesis.cli", "run", url + "/openapi.json", "--checks", CHECKS,
                   "--max-examples", str(options.examples), "--seed", str(options.seed), "--request-timeout", "60",
                   "--suppress-health-check", "all", "--continue-on-failure", "--no-color"]
        path = os.path.join(cluster.state, "schemathesis")
        with open(path, "w") as out:
            ran = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, cwd=cluster.state,
                                   env={**os.environ, "PYTHONPATH": cluster.state, "SCHEMATHESIS_HOOKS": "lite_hooks",
                                        "STATUSES": statuses})
            try:
                code = ran.wait(options.seconds)
            except subprocess.TimeoutExpired:
                ran.kill()
                ran.wait()
                code = f"no end within {options.seconds} s"
        said = open(path).read()
        if code != 0:
            broken.append(f"schemathesis: {code}; see {path}")
            print(said[-12_000:])
        with urllib.request.urlopen(url + "/health", timeout=30) as answer:
            if answer.status != 200:
                broken.append(f"/health says {answer.status}")
        ask = {"prompt": "ls - list", "max_tokens": 4}
        request = urllib.request.Request(url + "/v1/completions", json.dumps(ask).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            json.load(answer)
        broken += [f"{name} ended with {of.returncode}" for name, of in cluster.processes().items()
                   if of.poll() is not None]
    finally:
        cluster.stop()
    log = open(os.path.join(cluster.state, "log"), errors="replace").read()
    broken += [f"log: {line}" for line in re.findall(".*panicked.*", log)[:5]]
    seen = collections.defaultdict(collections.Counter)
    for label, status in map(json.loads, open(statuses)):
        seen[label][status] += 1
    for label, counts in sorted(seen.items()):
        codes = "  ".join(f"{code}: {count}" for code, count in sorted(counts.items()))
        print(f"{label:<36} {sum(counts.values()):>6}  {codes}")
    cases = sum(sum(counts.values()) for counts in seen.values())
    if not cases:
        broken.append("no request was made")
    print(json.dumps({"requests": cases, "operations": len(seen), "broken": broken, "folder": cluster.state}))
    sys.exit(1 if broken else 0)


main()
