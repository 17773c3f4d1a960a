"""A small Hugging Face hub on this machine: what ``huggingface_hub`` asks of the real one.

It keeps repositories as folders, takes commits as newline-delimited JSON, large files through Git
LFS, and answers downloads with the headers that the client's cache reads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_this_test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each with the content of its files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""

    def do_POST(self) -> None:
        body, path = self._read(), unquote(self.path)
        if self.hub.refuses or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            taken = name in self.hub.repositories
            self.hub.repositories.setdefault(name, {})
            self._answer(409 if taken else 200, {"url": f"{self._address}/{name}"})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            self._preupload(found[1], json.loads(body))
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._lfs(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            self._commit(found[1], body)
        else:
            self._answer(404, {"error": f"no {path}"})

    def do_PUT(self) -> None:
        content = self._read()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        self._send_file(with_body=True)

    def do_HEAD(self) -> None:
        self._send_file(with_body=False)

    def _preupload(self, name: str, asked: dict[str, Any]) -> None:
        if name not in self.hub.repositories:
            self._answer(404, {"error": "Repository not found"})
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._answer(200, {"files": files})

    def _lfs(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                **entry,
                "actions": {"upload": {"href": f"{self._address}/lfs/{entry['oid']}"}},
            }
            for entry in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        files = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        address = f"{self._address}/{name}/commit/{COMMIT}"
        self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": address})

    def _send_file(self, *, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/(.+?)(/revision/.+|/tree/.+)?", path):
            self._describe(found[1], is_tree="/tree/" in (found[2] or ""))
            return
        found = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path)
        content = self.hub.repositories.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            missing = bool(found) and found[1] in self.hub.repositories
            code = "EntryNotFound" if missing else "RepoNotFound"
            self._answer(404, {"error": "not found"}, **{"X-Error-Code": code})
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _describe(self, name: str, *, is_tree: bool) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            self._answer(404, {"error": "not found"}, **{"X-Error-Code": "RepoNotFound"})
            return
        listed = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in files.items()
        ]
        siblings = [{"rfilename": entry["path"]} for entry in listed]
        described = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        self._answer(200, listed if is_tree else described)

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _read(self) -> bytes:
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """Run a hub during a ``with`` block; yield it and its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
