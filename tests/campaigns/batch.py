#!/usr/bin/env python3
"""A file of jobs twice: once undisturbed, once with a worker killed and started again, a worker's link to the
coordinator cut, and the client's own connection cut, each once.

    python3 tests/campaigns/batch.py --jobs 20000

Every job of the second run must have the tokens of the first. Each process is on a host of its own (root, iproute2:
it skips with a line where they are not). Prints one line of JSON; exit code 1 if a job failed, is missing or changed.
"""

import argparse, json, os, sys, time

import cluster as clusters
from hosts import Hosts, Impossible

CUT = 5.0  # Seconds; a connection is lost after 2.
DOWN = 2.5


class Batch:
    def __init__(self, options, hosts):
        self.options, self.hosts = options, hosts
        self.cluster = clusters.Cluster(options, hosts)
        self.folder = self.cluster.state
        self.jobs = os.path.join(self.folder, "jobs.jsonl")
        with open(self.jobs, "w") as file:
            for seed in range(options.jobs):
                job = {"prompt": "ls - list", "seed": seed, "max_tokens": options.tokens, "temperature": 0.8}
                file.write(json.dumps(job) + "\n")

    def run(self, name, faults=()):
        """Submits the file; each fault comes when its share of the jobs has ended. Returns the answers by job."""
        path, began, faults = os.path.join(self.folder, name), time.time(), list(faults)
        with open(path, "wb") as out, open(path + ".err", "wb") as err:
            process = self.cluster.submit("--retry", "60s", "--file", self.jobs, stdout=out, stderr=err)
            while process.poll() is None:
                if faults and lines(path) >= faults[0][0] * self.options.jobs:
                    faults.pop(0)[1]()
                time.sleep(0.1)
        answers, again = {}, 0
        for line in open(path):
            answer = json.loads(line)
            again += answer["job"] in answers
            answers[answer["job"]] = answer
        figures = {"seconds": round(time.time() - began), "code": process.returncode, "answers": len(answers),
                   "failed": sum("error" in answer for answer in answers.values()), "twice": again,
                   "faults_left": len(faults)}
        return answers, figures

    def lose_worker(self):
        worker = self.cluster.workers["a"]
        worker.kill()
        worker.wait()
        time.sleep(DOWN)
        self.cluster.start_worker("a")

    def lose_link(self, host):
        self.hosts.cut((host, "coordinator"), ("coordinator", host))
        time.sleep(CUT)
        self.hosts.heal()


def lines(path):
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    clusters.arguments(parser, tokens=4)
    parser.add_argument("--jobs", type=int, default=20000)
    options = parser.parse_args()
    try:
        hosts = Hosts(["coordinator", "client", *clusters.names(options)])
    except Impossible as reason:
        print(f"skipped: {reason}")
        return
    batch = None
    try:
        batch = Batch(options, hosts)
        if not batch.cluster.ready(120):
            sys.exit(f"the cluster does not become ready; see {batch.folder}/log")
        alone, undisturbed = batch.run("undisturbed")
        faults = [(0.15, batch.lose_worker), (0.4, lambda: batch.lose_link("b")),
                  (0.65, lambda: batch.lose_link("client"))]
        answers, disturbed = batch.run("disturbed", faults)
    finally:
        if batch:
            batch.cluster.stop()
        hosts.down()
    of_interest = lambda answer: (answer.get("ids"), answer.get("text"), answer.get("end"))
    changed = [job for job in range(options.jobs)
               if job not in answers or of_interest(answers[job]) != of_interest(alone[job])]
    print(json.dumps({"jobs": options.jobs, "tokens_each": options.tokens, "undisturbed": undisturbed,
                      "disturbed": disturbed, "changed": len(changed), "first_changed": changed[:5],
                      "folder": batch.folder}))
    bad = changed or disturbed["failed"] or disturbed["twice"] or disturbed["code"] or disturbed["faults_left"]
    sys.exit(1 if bad else 0)


main()
