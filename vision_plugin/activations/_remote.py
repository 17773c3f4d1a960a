"""A store in object storage, such as ``s3://bucket/acts``: whole objects, copied when read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vision_plugin._untrusted import MAX_JSON_BYTES
from vision_plugin.activations._decoding import DecodedBatch
from vision_plugin.activations._errors import ManifestError, ShardError, StoreError
from vision_plugin.activations._files import STORE_FILE, whole_file
from vision_plugin.activations._plan import ShardTask, StorePlan
from vision_plugin.activations._records import MANIFEST, PLAN, ShardRecord

PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Kinds of storage whose objects appear whole or not at all."""
STORAGES = tuple(f"{name}://" for name in PROTOCOLS)
"""What the place of a store in object storage begins with."""
_URL = re.compile(r"([a-z][a-z0-9+]*)://(.*)", re.DOTALL)


def is_url(path: object) -> bool:
    """Return whether a path names a place in object storage.

    Args:
        path: A path, or a place such as ``s3://bucket/acts``.

    Examples:
        >>> vp.activations.is_url("s3://bucket/acts"), vp.activations.is_url("acts/")
        (True, False)
    """
    return isinstance(path, str) and _URL.fullmatch(path) is not None


class RemoteFolder:
    """A store in object storage: reads and writes whole objects.

    Args:
        url: Place of the store, for example ``s3://bucket/acts``. Keys, region and endpoint come
            from the environment, as the storage's own tools take them (``AWS_ACCESS_KEY_ID``,
            ``AWS_ENDPOINT_URL``).

    Raises:
        ValueError: the place is not in an object storage.
        ImportError: the storage needs a package that is not installed.

    Examples:
        >>> try:
        ...     vp.activations.RemoteFolder("acts/")
        ... except ValueError:
        ...     print("a folder of this machine")
        a folder of this machine
    """

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url)
        protocol = match.group(1) if match else ""
        if match is None or protocol not in PROTOCOLS or not match.group(2).strip("/"):
            raise ValueError(
                f"{url!r} is no place for a store: name a folder, or "
                f"{', '.join(STORAGES)} with a bucket"
            )
        self.url, self.root = url.rstrip("/"), match.group(2).strip("/")
        self._protocol = protocol

    @property
    def copies(self) -> Path:
        """Folder of this machine for copies of the objects."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return Path(cache) / "vision-plugin" / "stores" / name

    def sizes(self) -> dict[str, int]:
        """Return the size of each object of the store, by name.

        Raises:
            StoreError: the storage does not answer, or refuses.
        """
        try:
            found = self._call("list", lambda storage: storage.ls(self.root, detail=True))
        except FileNotFoundError:
            return {}
        named = {entry["name"].rsplit("/", 1)[-1]: entry for entry in found}
        return {
            name: int(entry["size"])
            for name, entry in named.items()
            if entry["type"] == "file" and STORE_FILE.fullmatch(name)
        }

    def read(self, name: str, *, most: int | None = None) -> bytes:
        """Return the bytes of an object.

        Raises:
            ShardError: there is no such object.
            ManifestError: it is larger than ``most``.
            StoreError: the storage does not answer, or refuses.
        """

        def reading(storage: Any) -> bytes:
            with storage.open(f"{self.root}/{name}", "rb") as stream:
                content: bytes = stream.read() if most is None else stream.read(most + 1)
                return content

        try:
            found: bytes = self._call(f"read {name}", reading)
        except FileNotFoundError as error:
            raise ShardError(name, f"expected in {self.url}, but it is missing") from error
        if most is not None and len(found) > most:
            raise ManifestError(f"{self.url}/{name}: expected at most {most:,} bytes, found more")
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write an object, which appears whole or not at all.

        Raises:
            StoreError: the storage does not answer, or refuses.
        """
        place = f"{self.root}/{name}"
        self._call(f"write {name}", lambda storage: storage.pipe_file(place, content))

    def pull(self, folder: Path) -> dict[str, int]:
        """Bring copies of the plan, the manifest and the markers up to date; no shards.

        A copy of a shard whose marker changed is removed, and so is what the storage has not.

        Args:
            folder: Folder for the copies.

        Returns:
            The size of each object in the storage, by name.
        """
        folder.mkdir(parents=True, exist_ok=True)
        sizes = self.sizes()
        for path in folder.iterdir():
            ours = STORE_FILE.fullmatch(path.name) and not path.name.startswith(".")
            if ours and path.name not in sizes:
                path.unlink(missing_ok=True)
        whole = self._renew(folder, MANIFEST, sizes)
        self._renew(folder, PLAN, sizes)
        for name in sorted(sizes):
            if name in (MANIFEST, PLAN) or not name.endswith(".json"):
                continue
            if whole and (folder / name).is_file():
                continue  # the manifest pins every marker by its hash
            if not self._renew(folder, name, sizes):
                (folder / name).with_suffix(".safetensors").unlink(missing_ok=True)
        return sizes

    def fetch(self, folder: Path, name: str) -> None:
        """Copy a shard into a folder, whole or not at all, unless it is there."""
        if not (folder / name).exists():
            content = self.read(name)
            with whole_file(folder / name) as stream:
                stream.write(content)

    def publish(self, folder: Path, task: ShardTask) -> None:
        """Write a shard and then its marker from a folder to the storage; the copies stay."""
        for name in (task.file, task.marker):
            self.write(name, (folder / name).read_bytes())

    def published(
        self, make: Callable[..., Generator[DecodedBatch | ShardRecord, None, None]]
    ) -> Callable[..., Generator[DecodedBatch | ShardRecord, None, None]]:
        """Return what makes shards, and yields the record of each once it is in the storage.

        A worker may have written the shard there itself: its marker is copied then.
        """

        def made(
            plan: StorePlan, tasks: Iterable[ShardTask], folder: Path
        ) -> Generator[DecodedBatch | ShardRecord, None, None]:
            for event in make(plan, tasks, folder):
                if isinstance(event, ShardRecord):
                    task = plan.task(event.index)
                    if (folder / task.file).is_file():
                        self.publish(folder, task)
                        (folder / task.file).unlink()
                    else:
                        self._renew(folder, task.marker, {task.marker: 0})
                yield event

        return made

    def _renew(self, folder: Path, name: str, sizes: dict[str, int]) -> bool:
        """Copy a JSON file; return whether the copy was up to date already."""
        if name not in sizes:
            return False
        content = self.read(name, most=MAX_JSON_BYTES)
        path = folder / name
        if path.is_file() and path.read_bytes() == content:
            return True
        with whole_file(path) as stream:
            stream.write(content)
        return False

    def _call(self, what: str, do: Callable[[Any], Any]) -> Any:
        try:
            return do(self._storage())
        except FileNotFoundError:
            raise
        except (OSError, TimeoutError) as error:
            said = " ".join(str(error).split())[:300]
            raise StoreError(
                f"{self.url} does not let us {what} ({said}): check the bucket, the keys and the "
                "endpoint in the environment, and run the same command again"
            ) from error

    def _storage(self) -> Any:
        import fsspec

        try:
            return fsspec.filesystem(self._protocol)
        except ImportError as error:
            if self._protocol not in ("s3", "s3a"):
                raise ImportError(f"{self.url} needs a package of fsspec: {error}") from None
        return _s3()


def _s3() -> Any:
    """Return S3 by pyarrow, which is installed anyway, where fsspec's own package is not."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    settings: dict[str, Any] = {}
    if url:
        parts = urlsplit(url)
        settings = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return ArrowFSWrapper(
        S3FileSystem(region=region, background_writes=False, **settings), skip_instance_cache=True
    )
