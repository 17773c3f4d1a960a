"""Processes that are forked to be killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


def in_child(work: Callable[[], object]) -> int:
    """Do something in a forked process; its number."""
    child = os.fork()
    if child == 0:
        _with_locks_of_its_own()
        try:
            work()
        except BaseException:  # nothing may leave the child but its exit status, and the reason
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return child


def _with_locks_of_its_own() -> None:
    """Give every progress bar a lock of this process.

    tqdm's own is shared by all forked processes: one that is killed would keep it, and one that is
    forked while another thread holds it would wait for ever. A subclass may have its own.
    """
    lock, kinds = threading.RLock(), [tqdm]
    for kind in kinds:
        kind.set_lock(lock)
        kinds.extend(kind.__subclasses__())


def ended(child: int) -> int:
    """Wait for a process; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_change(number: int, *, after: bool = False) -> None:
    """From now on this process kills itself at so manieth a call that changes what is on disk.

    Args:
        number: Which call, from 1 up: opening, syncing, renaming, removing.
        after: Kill once the call is done, not before.
    """
    left = number

    def wrapped(call: Callable[..., object]) -> Callable[..., object]:
        def counting(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = call(*args, **kwargs)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return counting

    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (Path, "replace"),
        (Path, "open"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, wrapped(getattr(owner, name)))
