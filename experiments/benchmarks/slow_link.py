"""A machine of its own at the end of a slow line: a network namespace whose packets pass through a process.

    with SlowLink() as link:
        link.popen(["ray", "start", ...])   # runs there, at link.there; this machine is link.here
        link.delay(0.5)
        link.cut(); link.mend()

Needs Linux and the right to make namespaces and interfaces.
"""

import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF, _TUN, _NO_HEADER = 0x400454CA, 0x0001, 0x1000
_NAMES = ("issgd-here", "issgd-there")
_MTU = 60_000  # few packets, so that the process that passes them on can follow
_MOST = 64  # packets taken from one end before the other has its turn


class SlowLink:
    """Two addresses, and a process between them."""

    here, there = "10.77.0.1", "10.77.0.2"

    def __enter__(self) -> "SlowLink":
        subprocess.run(["ip", "netns", "add", _NAMES[1]], check=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmarks.slow_link"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._process.stdout.readline()  # both interfaces are there
        inside = ["ip", "netns", "exec", _NAMES[1]]
        _run("ip", "link", "set", _NAMES[1], "netns", _NAMES[1])
        for prefix, name, address in (([], _NAMES[0], self.here), (inside, _NAMES[1], self.there)):
            _run(*prefix, "ip", "address", "add", f"{address}/24", "dev", name)
            _run(*prefix, "ip", "link", "set", name, "mtu", str(_MTU), "up")
        _run(*inside, "ip", "link", "set", "lo", "up")
        return self

    def __exit__(self, *exception):
        self._process.terminate()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        _run("ip", "netns", "delete", _NAMES[1])

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        """Starts a program on the machine there."""
        return subprocess.Popen(["ip", "netns", "exec", _NAMES[1], *command], **options)

    def delay(self, seconds: float) -> None:
        """Each packet takes so long, in each direction."""
        self._tell(f"{seconds}")

    def cut(self) -> None:
        """No packet passes."""
        self._tell("cut")

    def mend(self) -> None:
        self._tell("mend")

    def _tell(self, what: str) -> None:
        self._process.stdin.write(what.encode() + b"\n")
        self._process.stdin.flush()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _interface(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH", name.encode(), _TUN | _NO_HEADER))
    return handle


def pass_on() -> None:
    """Reads what to do from the standard input; ends with it."""
    ends = [_interface(name) for name in _NAMES]
    print("ready", flush=True)
    delay, is_cut, waiting, number = 0.0, False, [], 0
    while True:
        rest = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([*ends, sys.stdin], [], [], rest)
        if sys.stdin in readable:
            command = sys.stdin.readline().strip()
            if not command:
                return
            is_cut = command == "cut" if command in ("cut", "mend") else is_cut
            delay = delay if command in ("cut", "mend") else float(command)
        for source, target in (ends, ends[::-1]):
            for _ in range(_MOST if source in readable else 0):
                try:
                    packet = os.read(source, 2 * _MTU)
                except BlockingIOError:
                    break
                if not is_cut:
                    number += 1
                    heapq.heappush(waiting, (time.monotonic() + delay, number, target, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(waiting)
            try:
                os.write(target, packet)
            except OSError:  # an interface that is down, or full: a line loses packets
                continue


if __name__ == "__main__":
    pass_on()
