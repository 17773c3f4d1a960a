"""A real Ray cluster of several nodes on this machine; its processes are ended by their ids."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vision_plugin.scale._cluster import NOWHERE

RAY = str(Path(sys.executable).with_name("ray"))
COMMAND = str(Path(sys.executable).with_name("vision-plugin"))
START_SECONDS, ATTEMPTS = 100, 3
AGENT_PORTS = (
    *("dashboard-agent-listen-port", "dashboard-agent-grpc-port"),
    *("runtime-env-agent-port", "metrics-export-port"),
)
"""Ports that a node would else wait for: it gives up after 15 s, too soon on a busy machine."""

CHECKS, CHECK_SECONDS, BETWEEN_SECONDS = 4, 4, 2
"""How soon a node that is cut off counts as dead: docs/scale.md names these settings."""


def patience(seconds: float) -> float:
    """How long to wait here for what takes so many seconds where no process waits for a core."""
    return seconds * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def parents() -> dict[int, int]:
    """Parent of every process of this machine; zombies have ended."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def tree(root: int) -> set[int]:
    """A process and all that it started, and these started."""
    of, found = parents(), {root}
    while more := {child for child, parent in of.items() if parent in found} - found:
        found |= more
    return found


def title(process: int) -> str:
    """Command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill(processes: set[int], sign: signal.Signals = signal.SIGKILL) -> None:
    """SIGKILL processes, or send them another signal; some may have ended."""
    for process in processes:
        try:
            os.kill(process, sign)
        except ProcessLookupError:
            continue


def held(root: int) -> set[int]:
    """The tree of a process, stopped: none of it can start another between here and its end."""
    found: set[int] = set()
    while more := tree(root) - found:
        kill(more, signal.SIGSTOP)
        found |= more
    return found


def alive(processes: set[int]) -> set[int]:
    """Those of some processes that have not ended."""
    return processes & parents().keys()


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until a function returns something true, longer on a busy machine."""
    begun = time.monotonic()
    while not condition():
        waited = time.monotonic() - begun
        assert waited < patience(seconds), f"waited {waited:.0f} s for {what}"
        time.sleep(0.05)


def said(command: subprocess.Popen[str], seconds: float) -> str:
    """What a command says until it ends; it is killed if it does not."""
    try:
        return command.communicate(timeout=patience(seconds))[0]
    except subprocess.TimeoutExpired:
        kill(tree(command.pid))
        told = command.communicate()[0]
        raise AssertionError(f"it did not end in {patience(seconds):.0f} s: {told}") from None


class Cluster:
    """A head, and nodes that join it. Leaving the ``with`` block ends every process of it."""

    def __init__(self, *, prefix: Sequence[str] = (), host: str = "127.0.0.1") -> None:
        """Set where the head and the commands run.

        Args:
            prefix: What comes before a command to run it on the head's host.
            host: Address of that host.
        """
        self.host, self.prefix, self.port = host, list(prefix), free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="vpr-", dir="/tmp"))
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.env = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_USAGE_STATS_REPORT_URL": NOWHERE,
            "RAY_raylet_start_wait_time_s": str(round(patience(START_SECONDS))),
            "RAY_agent_register_timeout_ms": str(round(1000 * patience(START_SECONDS))),
            "RAY_health_check_failure_threshold": str(CHECKS),
            "RAY_health_check_timeout_ms": str(round(1000 * patience(CHECK_SECONDS))),
            "RAY_health_check_period_ms": str(1000 * BETWEEN_SECONDS),
            "MKL_CBWR": "AUTO,STRICT",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "",
            "HF_HUB_OFFLINE": "1",
        }
        home = self.folder / "home"
        home.mkdir()
        (home / "ray_bootstrap_config.yaml").write_text("{}")  # else Ray asks clouds where it is
        self.env_of_node = {**self.env, "HOME": str(home)}
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.seen: set[int] = set()

    @property
    def address(self) -> str:
        """Where the head listens."""
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            self.end(node)
        assert not self.left(), [title(process) for process in self.left()]
        shutil.rmtree(self.folder, ignore_errors=True)

    def left(self) -> set[int]:
        """Processes of the cluster that outlived it."""
        time.sleep(0.2)
        own = {os.getpid()}
        named = {p for p in parents() if str(self.folder) in title(p)} - own
        return alive(self.seen) | named

    def start(
        self,
        *,
        head: bool = False,
        cpus: int = 1,
        prefix: Sequence[str] | None = None,
        host: str | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a node, on the head's host or another, and wait until it takes work."""
        for _ in range(ATTEMPTS):
            node = self._begin(head, cpus, prefix or self.prefix, host or self.host)
            log = self.folder / f"node-{len(self.nodes)}.log"
            deadline = time.monotonic() + patience(START_SECONDS)
            while node.poll() is None and time.monotonic() < deadline:
                if b"Ray runtime started" in log.read_bytes():
                    return node
                time.sleep(0.05)
            self.end(node)
        raise AssertionError(f"no node starts: {log.read_text()}")

    def _begin(
        self, head: bool, cpus: int, prefix: Sequence[str], host: str
    ) -> subprocess.Popen[bytes]:
        where = ["--head", f"--port={self.port}"] if head else [f"--address={self.address}"]
        if head:
            where += ["--include-dashboard=false", f"--temp-dir={self.folder / 'r'}"]
        with (self.folder / f"node-{len(self.nodes) + 1}.log").open("wb") as stream:
            node = subprocess.Popen(
                [
                    *prefix,
                    *(RAY, "start", "--block", *where),
                    *(f"--num-cpus={cpus}", "--num-gpus=0", f"--node-ip-address={host}"),
                    *("--object-store-memory=100000000", "--disable-usage-stats"),
                    *(f"--{name}={free_port()}" for name in AGENT_PORTS),
                ],
                env=self.env_of_node,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

    def end(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL a node: every process of it, at once, with those that it starts meanwhile."""
        if node.poll() is None:
            found = held(node.pid)
            self.seen |= found
            kill(found)
            node.wait()
            until(lambda: not alive(found), 30, "killed processes to end")

    def workers(self, node: subprocess.Popen[bytes], doing: str) -> set[int]:
        """Processes of a node that do a task now."""
        return {p for p in tree(node.pid) if title(p).startswith(f"ray::{doing}")}

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin a command of ours on the cluster."""
        return subprocess.Popen(
            [*self.prefix, COMMAND, *arguments, "--engine", "ray", "--address", self.address],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
