"""Run a command in several processes of this machine that form a group, as ``torchrun`` does."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

_RUN = "import sys; from vision_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
_LOOK_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], n_processes: int) -> int:
    """Run ``vision-plugin`` with arguments in several processes that train one SAE together.

    The first process speaks; what the others write is seen if one of them fails.

    Args:
        arguments: Command line without the program's name.
        n_processes: Number of processes.

    Returns:
        Exit status of the process that failed first; 0 where all succeeded.

    Raises:
        ChildProcessError: a signal ended one of them; the others were ended then.

    Examples:
        >>> vp.scale.launch(["info", "acts"], n_processes=1)
        0
    """
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(n_processes),
        "LOCAL_WORLD_SIZE": str(n_processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if not sys.platform.startswith("win"):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _RUN, *arguments],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.PIPE,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        for rank in range(n_processes)
    ]
    try:
        failed = _first_failed(running)
    finally:
        for process in running:
            process.kill()
            process.wait()
    if failed is None:
        return 0
    rank, status = failed
    if status < 0:
        raise ChildProcessError(
            f"worker {rank} of {n_processes} was ended by {signal.Signals(-status).name}: run the "
            "same command again, which continues from the last checkpoint"
        )
    if rank:
        stderr = running[rank].stderr
        assert stderr is not None
        sys.stderr.write(stderr.read().decode(errors="replace"))
    return status


def _first_failed(running: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Wait until all succeed or one fails; return the number and exit status of that.

    All of them find the same fault: the first process is then asked what it says.
    """
    while True:
        found = [process.poll() for process in running]
        failed = [(rank, status) for rank, status in enumerate(found) if status]
        if failed:
            rank, status = failed[0]
            if rank and status > 0:
                try:
                    first = running[0].wait(timeout=5)
                except subprocess.TimeoutExpired:
                    first = 0  # it waits for the others, and is ended
                if first:
                    return 0, first
            return rank, status
        if all(status == 0 for status in found):
            return None
        time.sleep(_LOOK_SECONDS)


def _end_with_parent() -> None:
    """Let the system end this process when the one that started it ends, for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
