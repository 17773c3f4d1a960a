"""A real S3 server of this machine: moto's, in an environment of its own.

It needs an older python-dateutil than matplotlib does, and cannot be installed beside it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

MOTO = "moto[server]==5.2.5"


def s3_server(folder: Path) -> Iterator[str]:
    """Yield the server's address; its process ends with the generator."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which fetches moto's S3 server, is not installed")
    ready = subprocess.run(
        [uv, "tool", "run", "--from", MOTO, "moto_server", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if ready.returncode:
        pytest.skip(f"moto's S3 server cannot be fetched: {ready.stderr.strip()[-200:]}")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    log = folder / "moto.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [uv, "tool", "run", "--from", MOTO, "moto_server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                make = urllib.request.Request(f"{address}/bucket", method="PUT")
                urllib.request.urlopen(make, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        from tests.scale._cluster import kill, tree

        kill(tree(server.pid))
        server.wait()
