"""What the measurements beside other programs share: commands that are timed, and who else used the machine."""
import os, resource, subprocess, sys, time


def busy():
    v = [int(x) for x in open("/proc/stat").readline().split()[1:9]]
    return (sum(v) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")


def timed(command, servers=()):
    """Standard output of a command, and the CPUs that others used meanwhile."""
    def cpu(pid):
        fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    used = lambda: sum(map(cpu, servers)) + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    b, u, t = busy(), used(), time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    others = max(0.0, (busy() - b - (used() - u)) / (time.time() - t))
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout, others
