"""``verify`` checks everything in a store; ``info`` says what is in it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vision_plugin._checksums import told
from vision_plugin._paths import local_path
from vision_plugin.activations._errors import ManifestError, ShardError, StoreError
from vision_plugin.activations._files import read_capped
from vision_plugin.activations._plan import StorePlan
from vision_plugin.activations._records import MANIFEST, PLAN, read_plan
from vision_plugin.activations._remote import STORAGES, RemoteFolder, is_url
from vision_plugin.activations._shards import Shard
from vision_plugin.activations._store import ActivationStore

_BLOCK = 8 * 1024 * 1024


@dataclass(frozen=True)
class Problem:
    """One file with a fault."""

    file: str
    message: str
    """What was expected, and what was found."""


@dataclass(frozen=True)
class VerificationReport:
    """What was checked, and what was found.

    Attributes:
        path: The store.
        n_images: Images in the shards that were checked.
        n_bytes: Bytes that were checked.
        problems: What is wrong, with the file each.

    Examples:
        >>> report = vp.activations.verify("acts")
        >>> report.complete, report.n_images, report.problems
        (True, 40, ())
    """

    path: str
    complete: bool
    """Whether the store has its manifest, so that nothing is missing."""
    n_shards: int
    """Shards that were checked."""
    n_images: int
    n_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether every file in the store is as it was written."""
        return not self.problems

    def __str__(self) -> str:
        """Return a summary, and a line per problem."""
        state = "complete" if self.complete else "incomplete (the same extraction continues it)"
        head = (
            f"{self.path}: {state}, {self.n_shards:,} shards, {self.n_images:,} images, "
            f"{self.n_bytes / 1e9:.2f} GB checked"
        )
        return told(head, [f"{problem.file}: {problem.message}" for problem in self.problems])


def holds_store(path: str | Path) -> bool:
    """Return whether a folder, or a place in object storage, has a store, finished or not.

    Args:
        path: A folder, or a place such as ``s3://bucket/acts``.

    Examples:
        >>> vp.activations.holds_store("acts"), vp.activations.holds_store("runs")
        (True, False)
    """
    if is_url(path):
        return str(path).startswith(STORAGES) and PLAN in RemoteFolder(str(path)).sizes()
    folder = local_path(path)
    return any((folder / name).is_file() for name in (MANIFEST, PLAN))


def verify(path: str | Path) -> VerificationReport:
    """Check every byte of a store against the hashes from when it was written.

    Of a store in object storage, every object is copied anew before it is checked.

    Args:
        path: A folder, or a place such as ``s3://bucket/acts``.

    Raises:
        FileNotFoundError: there is no store in the folder.

    Examples:
        >>> vp.activations.verify("acts").ok
        True
    """
    if is_url(path):
        with TemporaryDirectory(prefix="vision-plugin-verify-") as name:
            remote, copies = RemoteFolder(str(path)), Path(name)
            for file in sorted(remote.pull(copies)):
                remote.fetch(copies, file)
            return replace(verify(copies), path=str(path))
    folder = local_path(path)
    try:
        store = ActivationStore(folder)
    except StoreError as error:
        return _unreadable(folder, error)
    problems = _check_plan(folder, store)
    for shard in store.shards:
        problems += _check_shard(shard)
    problems += _check_strays(folder, store)
    return VerificationReport(
        path=str(folder),
        complete=store.complete,
        n_shards=len(store.shards),
        n_images=len(store),
        n_bytes=sum(shard.bytes for shard in store.shards),
        problems=tuple(problems),
    )


def _unreadable(folder: Path, error: StoreError) -> VerificationReport:
    """Check what can be checked although the manifest, the plan or a marker is damaged."""
    problems = []
    if os.path.lexists(folder / MANIFEST):
        problems.append(Problem(MANIFEST, str(error)))
    try:
        plan = read_plan(folder)
    except StoreError as second:
        problems.append(Problem(PLAN, str(second)))
        return VerificationReport(str(folder), False, 0, 0, 0, tuple(problems))
    shards = []
    for task in plan.marked_tasks(folder):
        try:
            shards.append(Shard(folder, plan, task))
        except StoreError as damaged:
            problems.append(Problem(task.marker, str(damaged)))
            continue
        problems += _check_shard(shards[-1])
    return VerificationReport(
        path=str(folder),
        complete=False,
        n_shards=len(shards),
        n_images=sum(shard.n_images for shard in shards),
        n_bytes=sum(shard.bytes for shard in shards),
        problems=tuple(problems),
    )


def _check_plan(folder: Path, store: ActivationStore) -> list[Problem]:
    if not (folder / PLAN).exists():
        return [Problem(PLAN, f"expected in {folder}, but it is missing")]
    try:
        plan: StorePlan = read_plan(folder)
    except StoreError as error:
        return [Problem(PLAN, str(error))]
    if plan.sha256 != store.plan.sha256:
        return [Problem(PLAN, f"expected {store.plan.sha256}, found {plan.sha256}")]
    return []


def _check_shard(shard: Shard) -> list[Problem]:
    """Return all problems of one shard: marker, size, header, hash, and each damaged chunk."""
    try:
        record = shard.record
    except (ManifestError, ShardError) as error:
        return [Problem(shard.task.marker, str(error)), *_check_bytes(shard, None)]
    return _check_bytes(shard, record.sha256)


def _check_bytes(shard: Shard, expected: str | None) -> list[Problem]:
    try:
        descriptor = shard.open()
    except (ShardError, ManifestError) as error:
        return [Problem(shard.task.file, str(error))]
    try:
        digest = hashlib.sha256()
        offset = 0
        while block := os.pread(descriptor, _BLOCK, offset):
            digest.update(block)
            offset += len(block)
        if expected is None or digest.hexdigest() == expected:
            return []
        message = f"expected SHA-256 {expected}, found {digest.hexdigest()}"
        return [Problem(shard.task.file, f"{message}{_damaged_chunks(shard, descriptor)}")]
    finally:
        os.close(descriptor)


def _damaged_chunks(shard: Shard, descriptor: int) -> str:
    """Return which images of which tensors are damaged."""
    found = []
    for name in shard.offsets:
        for chunk in range(shard.n_chunks):
            images = shard.chunk_images(chunk)
            room = bytearray(len(images) * shard.image_bytes(name))
            try:
                shard.read_chunk(descriptor, name, chunk, memoryview(room))
            except ShardError:
                found.append(f"{name} of images {images.start} to {images.stop - 1}")
    if not found:
        return ""
    more = f" and {len(found) - 3} more places" if len(found) > 3 else ""
    return f"; damaged: {', '.join(found[:3])}{more}"


def _check_strays(folder: Path, store: ActivationStore) -> list[Problem]:
    """Return files that look like a part of the store but are not."""
    return [
        Problem(path.name, "expected no such file in a store of this plan, found one")
        for path in sorted(folder.iterdir())
        if path.name.startswith("shard-") and store.plan.task_of(path.name) is None
    ]


def info(path: str | Path) -> dict[str, Any]:
    """Return the contents of a store, as JSON values.

    Args:
        path: A folder, or a place such as ``s3://bucket/acts``.

    Raises:
        FileNotFoundError: there is no store in the folder.
        StoreError: the store cannot be read.

    Examples:
        >>> sorted(vp.activations.info("acts"))[:3]
        ['bad_images', 'batch_size', 'bytes']
    """
    store = ActivationStore(path)
    [folder] = store.paths
    plan = store.plan
    file = MANIFEST if store.complete else PLAN
    return {
        "path": str(path),
        "complete": store.complete,
        "schema_version": str(_version(folder, file)),
        "model": plan.to_json()["model"],
        "preprocessing": plan.preprocessing,
        "image_size": list(plan.image_size),
        "hooks": {
            spec.name: {
                "d_in": spec.d_in,
                "rows_per_image": spec.rows_per_image,
                "rows": store.n_rows(spec.name),
            }
            for spec in plan.hooks
        },
        "tokens": plan.to_json()["tokens"],
        "dtype": plan.dtype,
        "images": plan.images,
        "n_images": len(store),
        "n_labels": len(set(store.labels or [])),
        "bad_images": [{"id": bad.id, "reason": bad.reason} for bad in store.bad_images],
        "shards": len(store.shards),
        "bytes": sum(shard.bytes for shard in store.shards),
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "images_per_shard": plan.images_per_shard,
    }


def _version(folder: Path, file: str) -> Any:
    from vision_plugin.activations._files import parse_json

    return parse_json(read_capped(folder, file), folder / file)["schema_version"]
