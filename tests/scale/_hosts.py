"""Two hosts made of network namespaces on this machine, joined by a cable that can be pulled."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_CAPTURE = """
import collections, json, signal, socket, struct, sys
found = collections.Counter()
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
wire.bind((sys.argv[1], 0))
def end(*_):
    with open(sys.argv[2], "w") as stream:
        json.dump(found, stream)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True:
    packet = wire.recv(65535)
    kind = struct.unpack("!H", packet[12:14])[0]
    if kind == 0x0800:
        found[socket.inet_ntoa(packet[26:30]) + " " + socket.inet_ntoa(packet[30:34])] += 1
    else:
        found[hex(kind)] += 1
"""


@dataclass(frozen=True)
class Host:
    """A namespace with an address of its own; each process in it gets its own ``/dev/shm``."""

    name: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """What comes before a command to run it there."""
        mount = 'mount -t tmpfs -o size=300m tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "-m", "sh", "-c", mount, "sh"]

    def ip(self, *arguments: str) -> None:
        """Run ``ip`` in the namespace."""
        subprocess.run(["ip", "-n", self.name, *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts on one cable, each with the other as its way to anywhere else.

    Whatever a process sends to a third place goes over the cable too, and is seen there.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("hosts of network namespaces need root, iproute2 and util-linux")
    tag = secrets.token_hex(3)
    hosts = tuple(Host(f"vp{tag}{n}", f"10.77.0.{n}") for n in (1, 2))
    made = subprocess.run(
        ["ip", "netns", "add", hosts[0].name], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"the system allows no network namespaces: {made.stderr.strip()}")
    try:
        subprocess.run(["ip", "netns", "add", hosts[1].name], check=True)
        ends = [f"v{tag}{n}" for n in (1, 2)]
        cable = ["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]
        subprocess.run(cable, check=True)
        for host, end, other in zip(hosts, ends, reversed(hosts), strict=True):
            subprocess.run(
                ["ip", "link", "set", end, "netns", host.name, "name", "eth0"], check=True
            )
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", "eth0", "up")
            host.ip("route", "add", "default", "via", other.address)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


@contextmanager
def captured(host: Host, file: Path) -> Iterator[dict[str, int]]:
    """Count the packets on a host's cable, by sender and receiver; known after the block."""
    found: dict[str, int] = {}
    listener = subprocess.Popen(
        ["ip", "netns", "exec", host.name, sys.executable, "-c", _CAPTURE, "eth0", str(file)],
        stdout=subprocess.PIPE,
    )
    assert listener.stdout is not None
    assert listener.stdout.readline() == b"ready\n"
    try:
        yield found
    finally:
        time.sleep(0.5)
        listener.send_signal(signal.SIGTERM)
        listener.wait(timeout=30)
        found.update(json.loads(file.read_text()))


def memory(processes: set[int]) -> int:
    """Bytes that some processes take on a host of their own.

    That is what each has alone, and of each file that they map the most that one of them shares:
    other processes of this machine, such as another node's, do not lower it.
    """
    private, shared = 0, dict[str, int]()
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps").read_text().splitlines()
        except OSError:
            continue  # it ended meanwhile
        of, mapped = dict[str, int](), ""
        for words in map(str.split, lines):
            if not words[0].endswith(":"):
                mapped = " ".join(words[5:]) or words[0]  # a file, or where it lies
            elif words[0].startswith("Private_") and words[0] != "Private_Hugetlb:":
                private += 1024 * int(words[1])
            elif words[0] in ("Shared_Clean:", "Shared_Dirty:"):
                of[mapped] = of.get(mapped, 0) + 1024 * int(words[1])
        for name, size in of.items():
            shared[name] = max(size, shared.get(name, 0))
    return private + sum(shared.values())
