#!/usr/bin/env python3
"""Kills the coordinator, by SIGKILL and at random moments, while batches of detached jobs are accepted and run.

    python3 tests/campaigns/ledger.py --kills 200 --jobs 500
    python3 tests/campaigns/ledger.py --kills 200 --jobs 500 --http

With --http they are batches of the HTTP API: a file is uploaded, a batch made of it under an Idempotency-Key, and its
output read when it has ended, all of it by a client that asks again whenever it is not answered.

Every result is compared with that of the same job before the first kill, and the ledger's own list with what was
submitted. Batches follow each other until there were enough kills. Prints one line of JSON; exit code 1 if a job was
lost, came twice or changed.
"""

import argparse, http.client, json, os, random, subprocess, sys, threading, time

import cluster as clusters

NAME = "campaign"


class Http(threading.Thread):
    """One batch of the HTTP API, from its file to its answers."""

    def __init__(self, campaign, number):
        super().__init__(daemon=True)
        self.campaign, self.number = campaign, number
        self.lines, self.failed, self.again = [], None, 0

    def run(self):
        try:
            self.lines = self.answers()
        except Exception as error:
            self.failed = repr(error)

    def poll(self):
        """As a process says whether it has ended."""
        return None if self.is_alive() else 0

    def answers(self):
        mark = "b0undary"
        body = "".join(f'--{mark}\r\nContent-Disposition: form-data; name={name}\r\n\r\n{content}\r\n'
                       for name, content in (('"purpose"', "batch"),
                                             ('"file"; filename="a.jsonl"', self.campaign.http_lines)))
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        file = self.ask("POST", "/v1/files", f"{body}--{mark}--\r\n", kind)["id"]
        wanted = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        kind = {"Content-Type": "application/json", "Idempotency-Key": f"batch-{self.number}"}
        batch = self.ask("POST", "/v1/batches", json.dumps(wanted), kind)["id"]
        until = time.time() + 1800
        while (state := self.ask("GET", f"/v1/batches/{batch}"))["status"] not in ("completed", "failed", "cancelled"):
            if time.time() > until:
                raise RuntimeError(f"no end within 1800 s: {state}")
            time.sleep(0.2)
        if state["status"] != "completed" or state["error_file_id"]:
            raise RuntimeError(f"{state}")
        return self.ask("GET", f"/v1/files/{state['output_file_id']}/content", lines=True)

    def ask(self, method, path, body=None, headers={}, lines=False):
        """The answer, however often it takes: what is asked is taken once."""
        until, said = time.time() + 120, None
        while time.time() < until:
            connection = http.client.HTTPConnection(*self.campaign.cluster.http, timeout=30)
            try:
                connection.request(method, path, body.encode() if body else None, headers)
                reply = connection.getresponse()
                said = reply.status, reply.read().decode()
                if reply.status == 200:
                    return [json.loads(line) for line in said[1].splitlines()] if lines else json.loads(said[1])
                if reply.status not in (429, 503):
                    break
            except (OSError, http.client.HTTPException) as error:
                said = repr(error)
            finally:
                connection.close()
            self.again += 1
            time.sleep(0.1)
        raise RuntimeError(f"{method} {path}: {said}")


class Campaign:
    def __init__(self, options):
        self.options, self.dice = options, random.Random(options.seed)
        self.cluster = clusters.Cluster(options)
        self.folder = self.cluster.state
        self.file = os.path.join(self.folder, "jobs.jsonl")
        prompts = ["ls - list", "To print the current", "The grep command", "EXIT STATUS"]
        self.http_lines = ""
        with open(self.file, "w") as file:
            for seed in range(options.jobs):
                tokens = 1 + self.dice.randrange(2 * options.tokens)
                job = {"prompt": prompts[seed % 4], "seed": seed, "max_tokens": tokens}
                file.write(json.dumps({**job, "custom_id": f"c{seed}"}) + "\n")
                # As `submit` chooses where nothing is said.
                job = {**job, "temperature": 0.7, "top_k": 40}
                self.http_lines += json.dumps({"custom_id": f"c{seed}", "method": "POST", "url": "/v1/completions",
                                               "body": job}) + "\n"
        self.kills, self.lost, self.twice, self.changed, self.failed = 0, 0, 0, 0, []
        self.finished, self.again = 0, 0

    def run(self):
        if not self.cluster.ready(120):
            sys.exit(f"the cluster does not become ready; see {self.folder}/log")
        began = time.time()
        attached = self.cluster.submit("--file", self.file, stdout=subprocess.PIPE, text=True)
        out, _ = attached.communicate(timeout=3600)
        of = of_answer if self.options.http else of_interest
        self.expected = {line["custom_id"]: of(line) for line in map(json.loads, out.splitlines())}
        if len(self.expected) != self.options.jobs:
            sys.exit(f"only {len(self.expected)} of {self.options.jobs} jobs have an answer without kills")
        self.undisturbed = time.time() - began
        batches = 0
        while self.kills < self.options.kills and not self.failed:
            self.batch(batches)
            batches += 1
        self.look_at_ledger(batches)
        self.batches = batches

    def batch(self, number):
        results = os.path.join(self.folder, f"results-{number}.jsonl")
        if self.options.http:
            process = Http(self, number)
            process.start()
        else:
            process = self.cluster.submit("--as", NAME, "--retry", "120s", "--file", self.file, "--wait",
                                          "--out", results, stdout=self.cluster.log, stderr=self.cluster.log)
        while process.poll() is None and self.kills < self.options.kills:
            time.sleep(self.dice.choice([self.dice.uniform(0, 0.3), self.dice.uniform(0, self.options.pause)]))
            self.cluster.coordinator.kill()
            self.cluster.coordinator.wait()
            self.kills += process.poll() is None
            self.cluster.coordinator = self.cluster.start_coordinator()
        if self.options.http:
            process.join(2000)
            if process.failed or process.is_alive():
                self.failed.append(f"batch {number}: {process.failed}")
                return
            self.again += process.again
            self.count((line["custom_id"], of_choice(line)) for line in process.lines)
            return
        try:
            code = process.wait(timeout=1800)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "no end within 1800 s"
        if code != 0:
            self.failed.append(f"batch {number}: {code}")
            return
        self.count((line["custom_id"], of_interest(line)) for line in map(json.loads, open(results)))

    def count(self, answers):
        seen = {}
        for job, answer in answers:
            self.twice += job in seen
            seen[job] = answer
        self.lost += sum(job not in seen for job in self.expected)
        self.changed += sum(seen[job] != answer for job, answer in self.expected.items() if job in seen)
        self.finished += len(seen)

    def look_at_ledger(self, batches):
        """Every batch was taken once, and all that is in the ledger has ended."""
        self.cluster.ready(120)
        listed, most = [], 4096
        last = batches * self.options.jobs
        for first in range(1, last + most, most):
            whose = ["--all", "--state", self.folder] if self.options.http else \
                ["--as", NAME, "--token", self.cluster.token("client")]
            ask = [self.options.binary, "job", f"{first}-{first + most - 1}", "--json", *whose]
            ran = subprocess.run(ask, capture_output=True, text=True)
            listed += map(json.loads, ran.stdout.splitlines())
        self.twice += max(0, len(listed) - last)
        self.lost += max(0, last - len(listed))
        open_jobs = [job["job"] for job in listed if "end" not in job]
        if open_jobs:
            self.failed.append(f"open in the ledger: {open_jobs[:5]}")

    def result(self):
        return {"kills": self.kills, "batches": self.batches, "jobs_each": self.options.jobs,
                "asked_again": self.again, "finished": self.finished, "lost": self.lost, "twice": self.twice,
                "changed": self.changed,
                "failed": self.failed, "seconds_of_a_batch_without_kills": round(self.undisturbed, 1),
                "folder": self.folder}


def of_interest(answer):
    return answer.get("ids"), answer.get("text"), answer.get("end")


def of_answer(answer):
    """Of a result of `submit`, what an answer of the HTTP API says, too."""
    return answer.get("text"), len(answer.get("ids") or [])


def of_choice(line):
    """The same of a line of a batch's output."""
    body = line["response"]["body"]
    return body["choices"][0]["text"], body["usage"]["completion_tokens"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    clusters.arguments(parser, tokens=40)
    parser.set_defaults(workers=2, replicas=1)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pause", type=float, default=2.0, help="most seconds between two kills")
    parser.add_argument("--http", action="store_true", help="batches of the HTTP API")
    options = parser.parse_args()
    campaign = Campaign(options)
    began = time.time()
    try:
        campaign.run()
    finally:
        campaign.cluster.stop()
    print(json.dumps({**campaign.result(), "seconds": round(time.time() - began)}))
    sys.exit(1 if campaign.failed or campaign.lost or campaign.twice or campaign.changed else 0)


main()
