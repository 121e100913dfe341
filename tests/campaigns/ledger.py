#!/usr/bin/env python3
"""Kills the coordinator, by SIGKILL and at random moments, while batches of detached jobs are accepted and run.

    python3 tests/campaigns/ledger.py --kills 200 --jobs 500

Every result is compared with that of the same job before the first kill, and the ledger's own list with what was
submitted. Batches follow each other until there were enough kills. Prints one line of JSON; exit code 1 if a job was
lost, came twice or changed.
"""

import argparse, json, os, random, subprocess, sys, time

import cluster as clusters

NAME = "campaign"


class Campaign:
    def __init__(self, options):
        self.options, self.dice = options, random.Random(options.seed)
        self.cluster = clusters.Cluster(options)
        self.folder = self.cluster.state
        self.file = os.path.join(self.folder, "jobs.jsonl")
        prompts = ["ls - list", "To print the current", "The grep command", "EXIT STATUS"]
        with open(self.file, "w") as file:
            for seed in range(options.jobs):
                tokens = 1 + self.dice.randrange(2 * options.tokens)
                file.write(json.dumps({"prompt": prompts[seed % 4], "seed": seed, "max_tokens": tokens,
                                       "custom_id": f"c{seed}"}) + "\n")
        self.kills, self.lost, self.twice, self.changed, self.failed = 0, 0, 0, 0, []
        self.finished = 0

    def run(self):
        if not self.cluster.ready(120):
            sys.exit(f"the cluster does not become ready; see {self.folder}/log")
        began = time.time()
        attached = self.cluster.submit("--file", self.file, stdout=subprocess.PIPE, text=True)
        out, _ = attached.communicate(timeout=3600)
        self.expected = {line["custom_id"]: of_interest(line) for line in map(json.loads, out.splitlines())}
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
        process = self.cluster.submit("--as", NAME, "--retry", "120s", "--file", self.file, "--wait",
                                      "--out", results, stdout=self.cluster.log, stderr=self.cluster.log)
        while process.poll() is None and self.kills < self.options.kills:
            time.sleep(self.dice.choice([self.dice.uniform(0, 0.3), self.dice.uniform(0, self.options.pause)]))
            self.cluster.coordinator.kill()
            self.cluster.coordinator.wait()
            self.kills += process.poll() is None
            self.cluster.coordinator = self.cluster.start_coordinator()
        try:
            code = process.wait(timeout=1800)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "no end within 1800 s"
        if code != 0:
            self.failed.append(f"batch {number}: {code}")
            return
        seen = {}
        for line in map(json.loads, open(results)):
            self.twice += line["custom_id"] in seen
            seen[line["custom_id"]] = of_interest(line)
        self.lost += sum(job not in seen for job in self.expected)
        self.changed += sum(seen[job] != answer for job, answer in self.expected.items() if job in seen)
        self.finished += len(seen)

    def look_at_ledger(self, batches):
        """Every batch was taken once, and all that is in the ledger has ended."""
        self.cluster.ready(120)
        listed, most = [], 4096
        last = batches * self.options.jobs
        for first in range(1, last + most, most):
            ask = [self.options.binary, "job", f"{first}-{first + most - 1}", "--json", "--as", NAME,
                   "--token", self.cluster.token("client")]
            ran = subprocess.run(ask, capture_output=True, text=True)
            listed += map(json.loads, ran.stdout.splitlines())
        self.twice += max(0, len(listed) - last)
        self.lost += max(0, last - len(listed))
        open_jobs = [job["job"] for job in listed if "end" not in job]
        if open_jobs:
            self.failed.append(f"open in the ledger: {open_jobs[:5]}")

    def result(self):
        return {"kills": self.kills, "batches": self.batches, "jobs_each": self.options.jobs,
                "finished": self.finished, "lost": self.lost, "twice": self.twice, "changed": self.changed,
                "failed": self.failed, "seconds_of_a_batch_without_kills": round(self.undisturbed, 1),
                "folder": self.folder}


def of_interest(answer):
    return answer.get("ids"), answer.get("text"), answer.get("end")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    clusters.arguments(parser, tokens=40)
    parser.set_defaults(workers=2, replicas=1)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pause", type=float, default=2.0, help="most seconds between two kills")
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
