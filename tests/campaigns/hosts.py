"""Hosts of their own on one machine: network namespaces around a router, whose links are cut, slowed and made lossy.

Needs root, `ip` (iproute2) and /dev/net/tun; nothing that is done here is seen outside the namespaces. What is
delayed or dropped at random goes through a process of this file that reads a tun device (kernels without netem have
no other way); a cut is a rule of the router, one for each direction.
"""

import fcntl, heapq, os, random, select, struct, subprocess, sys, time

SLOW = "7"  # The routing table of what goes through the relay.


class Impossible(Exception):
    pass


class Hosts:
    def __init__(self, names):
        self.numbers = {name: number for number, name in enumerate(names, 1)}
        self.prefix, self.rules, self.relay = f"llm{os.getpid()}", [], None
        if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
            raise Impossible("hosts of their own need root and /dev/net/tun")
        try:
            self.up()
        except (OSError, subprocess.CalledProcessError) as error:
            self.down()
            raise Impossible(f"no network namespaces here: {getattr(error, 'stderr', None) or error}") from error

    def up(self):
        self.add("router")
        for setting in ["ip_forward=1", "conf/all/rp_filter=0", "conf/default/rp_filter=0"]:
            path, value = setting.split("=")
            self.inside("router", "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{path}")
        self.ip("router", "tuntap add dev relay mode tun")
        self.ip("router", "link set relay up")
        self.ip("router", f"route add default dev relay table {SLOW}")
        for name, number in self.numbers.items():
            self.add(name)
            self.ip("router", f"link add v{number} type veth peer name eth0 netns {self.prefix}-{name}")
            self.ip("router", f"addr add 10.77.{number}.1/24 dev v{number}")
            self.ip("router", f"link set v{number} up")
            self.ip(name, f"addr add {self.address(name)}/24 dev eth0")
            self.ip(name, "link set eth0 up")
            self.ip(name, f"route add default via 10.77.{number}.1")

    def down(self):
        self.heal()
        for name in [*self.numbers, "router"]:
            subprocess.run(["ip", "netns", "del", f"{self.prefix}-{name}"], stderr=subprocess.DEVNULL)

    def address(self, name):
        return f"10.77.{self.numbers[name]}.2"

    def on(self, name):
        """What stands before a command that runs on a host."""
        return ["ip", "netns", "exec", f"{self.prefix}-{name}"]

    def cut(self, *ways):
        """Nothing goes these ways, each (from, to), until they are healed."""
        for way in ways:
            self.rule(way, "blackhole")

    def slow(self, delay, loss, *ways):
        """What goes these ways takes `delay` seconds more, half of them or half as many more at random, and is lost
        with a probability."""
        command = [*self.on("router"), sys.executable, os.path.abspath(__file__), str(delay), str(loss)]
        self.relay = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.relay.stdout.readline()
        for way in ways:
            self.rule(way, f"lookup {SLOW}")

    def heal(self):
        for rule in self.rules:
            self.ip("router", f"rule del {rule}")
        self.rules = []
        if self.relay:
            self.relay.kill()
            self.relay.wait()
            self.relay = None

    def rule(self, way, what):
        rule = f"iif v{self.numbers[way[0]]} to {self.address(way[1])} {what}"
        self.ip("router", f"rule add {rule}")
        self.rules.append(rule)

    def add(self, name):
        ip("netns", "add", f"{self.prefix}-{name}")
        self.ip(name, "link set lo up")

    def ip(self, name, words):
        ip("-n", f"{self.prefix}-{name}", *words.split())

    def inside(self, name, *command):
        subprocess.run([*self.on(name), *command], check=True, capture_output=True, text=True)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def relay(delay, loss):
    """Gives every packet of the tun device back to it, later or never."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    no_header, layer_3, set_interface = 0x1000, 0x0001, 0x400454CA
    fcntl.ioctl(tun, set_interface, struct.pack("16sH22x", b"relay", layer_3 | no_header))
    print("up", flush=True)
    held, count = [], 0
    while True:
        wait = max(0, held[0][0] - time.monotonic()) if held else None
        if select.select([tun], [], [], wait)[0]:
            packet, count = os.read(tun, 65536), count + 1
            if random.random() >= loss:
                heapq.heappush(held, (time.monotonic() + delay * random.uniform(0.5, 1.5), count, packet))
        while held and held[0][0] <= time.monotonic():
            os.write(tun, heapq.heappop(held)[2])


if __name__ == "__main__":
    relay(float(sys.argv[1]), float(sys.argv[2]))
