"""Connect to a Ray cluster, or start one on this machine for as long as it is needed."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ANSWER_SECONDS = 10.0
_START_SECONDS = "180"
"""How long Ray's processes may take to start; its own 30 s are too few on a busy machine."""

_SILENT_MS = "20000"
"""How long sent data may stay unacknowledged before a call to another machine fails. By Ray's own
two minutes, a task that is offered to a machine whose cable was pulled holds up the end so long."""

NOWHERE = "http://127.0.0.1:9/"
"""Where a cluster reports to: Ray would else report that it sends no statistics."""


class ClusterError(OSError):
    """The cluster does not answer, refuses, or lost what it was asked to do.

    Examples:
        >>> try:
        ...     with vp.scale.RayEngine("localhost:1"):
        ...         print("connected")
        ... except vp.scale.ClusterError:
        ...     print("no cluster answers there")
        no cluster answers there
    """

    exit_status = 1
    """Exit status of the command."""


def import_ray() -> Any:
    """Return the module ``ray``, with usage statistics off and authentication by token on.

    Raises:
        ImportError: Ray is not installed; the message says how to install it.
    """
    # Ray reads these when it is imported, and when its processes start.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_USAGE_STATS_REPORT_URL"] = NOWHERE
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_raylet_start_wait_time_s", _START_SECONDS)
    os.environ.setdefault("RAY_agent_register_timeout_ms", f"{_START_SECONDS}000")
    os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", _SILENT_MS)
    try:
        import ray
    except ImportError:
        raise ImportError(
            "engine='ray' needs Ray; install it with 'pip install vision-plugin[ray]'"
        ) from None
    return ray


@contextlib.contextmanager
def connected(address: str | None, *, dashboard: bool = False, **settings: Any) -> Iterator[Any]:
    """Yield the module ``ray``, connected to a cluster during a ``with`` block.

    A process that is connected already stays so.

    Args:
        address: ``HOST:PORT`` of the head of a running cluster; ``auto`` for the one on this
            machine or in ``RAY_ADDRESS``; None starts a cluster of this machine alone, which ends
            with the block.
        dashboard: Whether a cluster that is started here opens Ray's dashboard.
        **settings: Arguments of ``ray.init`` for a cluster that is started here.

    Raises:
        ClusterError: no cluster answers there, or it refuses this process.
        ImportError: Ray is not installed.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    with contextlib.ExitStack() as stack:
        if address is None:
            stack.enter_context(_token_of_its_own())
            settings = {"include_dashboard": dashboard, **settings}
        else:
            _check_token(ray, address)
            _check_answers(address)
            settings = {}
        stack.callback(ray.shutdown)
        _forget_token(ray)
        before = _children()
        try:
            ray.init(
                address="local" if address is None else address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **settings,
            )
        except Exception as error:
            for process in _children() - before:  # of a cluster that started in part
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            raise _refused(address, error) from error
        yield ray


def _forget_token(ray: Any) -> None:
    """Have Ray read the token: it keeps the first one of a process for every later cluster."""
    loader = getattr(ray._raylet, "AuthenticationTokenLoader", None)
    if loader is not None:
        loader.instance().reset_cache()


def _children() -> set[int]:
    """Return the processes that this one started and that have not ended; empty off Linux."""
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


def _refused(address: str | None, error: Exception) -> ClusterError:
    said = " ".join(str(error).split())[:300]
    if address is None:
        return ClusterError(
            f"Ray did not start on this machine ({said}): a busy machine may be too slow for it; "
            "run the same command again, or start a cluster with 'ray start --head' and name it "
            "with address=auto"
        )
    where = f"at address={address}"
    if "ersion mismatch" in said:
        return ClusterError(
            f"the cluster {where} runs another version of Ray or Python than this process: install "
            f"the same on every machine ({said})"
        )
    return ClusterError(
        f"no Ray cluster answers {where} with this token: start one with 'ray start --head', and "
        f"check address= and RAY_AUTH_TOKEN_PATH ({said})"
    )


def _check_token(ray: Any, address: str) -> None:
    del ray
    here = Path.home() / ".ray" / "auth_token"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_TOKEN") or Path(path or here).is_file():
        return
    raise ClusterError(
        f"there is no token for the cluster at address={address}: copy the one that its head has "
        f"to {path or here}, or name its file in RAY_AUTH_TOKEN_PATH ('ray get-auth-token "
        "--generate' makes one)"
    )


def _check_answers(address: str) -> None:
    """Raise if nothing listens at an address: Ray itself would try for minutes."""
    host, separator, port = address.rpartition(":")
    if address == "auto" or "://" in address:
        return
    if not separator or not port.isdigit():
        raise ClusterError(f"address={address!r}: use auto, or HOST:PORT of the cluster's head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at address={address} ({error}): start the cluster's head there with "
            f"'ray start --head --port={port}', or name another address"
        ) from error


@contextlib.contextmanager
def _token_of_its_own() -> Iterator[None]:
    """Give a cluster that starts here a new token, unless the user has one already."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vision-plugin-token-") as folder:
        path = Path(folder) / "token"
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
        try:
            yield
        finally:
            del os.environ["RAY_AUTH_TOKEN_PATH"]
