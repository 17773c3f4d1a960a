"""Records of a store's shards: a marker for each, and a manifest for all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from vision_plugin.activations._errors import ManifestError, ShardError
from vision_plugin.activations._fields import Fields
from vision_plugin.activations._files import parse_json, read_capped, sha256
from vision_plugin.activations._plan import (
    FORMAT,
    MAJOR,
    MINOR,
    ShardTask,
    StorePlan,
    check_version,
)

PLAN, MANIFEST = "plan.json", "manifest.json"
TOKEN_ROWS = "token_rows"
"""Name of the tensor with the tokens that ``random:n`` drew, [images, n]."""


@dataclass(frozen=True)
class BadImage:
    """An image that is not in the store, and the reason."""

    index: int
    """Number of the image in the collection."""
    id: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """Content and hashes of a complete shard.

    Attributes:
        index: Number of the shard.
        n_images: Images in it.
        bytes: Size of the file.
        sha256: Hash of the file, in hexadecimal.
        ids: Id of each image.
        labels: Label of each image; None where the collection has none.
        bad_images: Images that could not be read, with reasons.

    Examples:
        >>> from pathlib import Path
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo", images="demo:8", hook_names=[hook], output_path="acts-of-shards"
        ... )
        >>> maker = vp.activations.ShardMaker(cfg, model=model)
        >>> plan = maker.plan()
        >>> Path("acts-of-shards").mkdir()
        >>> record = maker.make(plan, plan.task(0), Path("acts-of-shards"))
        >>> record.n_images, len(record.sha256)
        (8, 64)
    """

    index: int
    n_images: int
    bytes: int
    sha256: str
    ids: tuple[str, ...]
    labels: tuple[str, ...] | None
    bad_images: tuple[BadImage, ...]
    checksums: dict[str, tuple[str, ...]]
    """XXH3-64 of each chunk of images, by tensor."""

    def to_json(self, plan: StorePlan) -> dict[str, Any]:
        """Return the document that the marker holds."""
        return {
            "format": FORMAT,
            "schema_version": f"{MAJOR}.{MINOR}",
            "plan_sha256": plan.sha256,
            "index": self.index,
            "n_images": self.n_images,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "ids": list(self.ids),
            "labels": None if self.labels is None else list(self.labels),
            "bad_images": [asdict(bad) for bad in self.bad_images],
            "checksums": {name: list(values) for name, values in self.checksums.items()},
        }

    @classmethod
    def from_json(
        cls, document: dict[str, Any], plan: StorePlan, task: ShardTask, where: Path
    ) -> ShardRecord:
        """Read a marker strictly.

        Raises:
            ManifestError: the marker is damaged, or belongs to another shard or plan.
        """
        fields = Fields(document, where)
        check_version(fields)
        expect(fields, "plan_sha256", plan.sha256)
        expect(fields, "index", task.index)
        bad = tuple(_bad_image(entry, task) for entry in fields.objects("bad_images"))
        ids, labels = fields.texts("ids"), fields.optional_texts("labels")
        n_images = fields.number("n_images")
        expect(fields, "n_images", task.stop - task.start - len(bad))
        for name, values in (("ids", ids), ("labels", labels)):
            if values is not None and len(values) != n_images:
                raise fields.error(name, f"{n_images} of them", str(len(values)))
        return cls(
            index=task.index,
            n_images=n_images,
            bytes=_size(fields, plan, n_images),
            sha256=fields.hash("sha256", 64),
            ids=tuple(ids),
            labels=None if labels is None else tuple(labels),
            bad_images=bad,
            checksums=_checksums(fields.object("checksums"), plan, n_images),
        )

    def image_indices(self, task: ShardTask) -> list[int]:
        """Return the collection's numbers of the images in the shard, in order."""
        bad = {image.index for image in self.bad_images}
        return [index for index in range(task.start, task.stop) if index not in bad]


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest records about a shard."""

    n_images: int
    bytes: int
    sha256: str
    marker_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete store's table of contents."""

    plan: StorePlan
    shards: tuple[ShardEntry, ...]
    bad_images: tuple[BadImage, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the document that manifest.json holds: the plan, then the shards."""
        n_images = sum(entry.n_images for entry in self.shards)
        tasks = list(self.plan.tasks())
        return {
            **self.plan.to_json(),
            "plan_sha256": self.plan.sha256,
            "n_images": n_images,
            "bad_images": [asdict(bad) for bad in self.bad_images],
            "shards": [
                {
                    "file": task.file,
                    **asdict(entry),
                    "rows": {
                        spec.name: entry.n_images * spec.rows_per_image for spec in self.plan.hooks
                    },
                    "marker": task.marker,
                }
                for task, entry in zip(tasks, self.shards, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, document: dict[str, Any], where: Path) -> Manifest:
        """Read a manifest strictly.

        Raises:
            ManifestError: the manifest is damaged, of another version, or contradicts itself.
        """
        fields = Fields(document, where)
        plan = StorePlan.from_json(document, where)
        expect(fields, "plan_sha256", plan.sha256)
        entries = fields.objects("shards")
        if len(entries) != plan.n_shards:
            raise fields.error("shards", f"{plan.n_shards} of them", str(len(entries)))
        shards = tuple(
            _entry(entry, task, plan) for entry, task in zip(entries, plan.tasks(), strict=True)
        )
        everything = ShardTask(0, 0, plan.n_images)
        bad = tuple(_bad_image(entry, everything) for entry in fields.objects("bad_images"))
        expect(fields, "n_images", sum(entry.n_images for entry in shards))
        if fields.number("n_images") + len(bad) != plan.n_images:
            raise fields.error("bad_images", "every image that is not stored", str(len(bad)))
        return cls(plan, shards, bad)


def expect(fields: Fields, name: str, expected: str | int) -> None:
    """Raise ManifestError unless a field has its only valid value."""
    found = fields.text(name) if isinstance(expected, str) else fields.number(name)
    if found != expected:
        raise fields.error(name, repr(expected), repr(found)[:80])


def read_plan(folder: Path, name: str = PLAN) -> StorePlan:
    """Read the plan of a store, which may be unfinished."""
    return StorePlan.from_json(parse_json(read_capped(folder, name), folder / name), folder / name)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete store."""
    where = folder / MANIFEST
    return Manifest.from_json(parse_json(read_capped(folder, MANIFEST), where), where)


def read_marker(
    folder: Path, plan: StorePlan, task: ShardTask, entry: ShardEntry | None = None
) -> ShardRecord:
    """Read the record of a complete shard.

    Raises:
        ShardError: the marker is missing, or not the one whose hash the manifest has.
        ManifestError: the marker is damaged.
    """
    content = read_capped(folder, task.marker)
    if entry is not None and sha256(content) != entry.marker_sha256:
        raise ShardError(
            task.marker, f"expected SHA-256 {entry.marker_sha256}, found {sha256(content)}"
        )
    where = folder / task.marker
    record = ShardRecord.from_json(parse_json(content, where), plan, task, where)
    if entry is not None and entry_of(record, content) != entry:
        raise ManifestError(f"{where}: expected the manifest's numbers, found other numbers")
    return record


def entry_of(record: ShardRecord, marker: bytes) -> ShardEntry:
    """Return the manifest's entry for a shard."""
    return ShardEntry(record.n_images, record.bytes, record.sha256, sha256(marker))


def tensor_shapes(plan: StorePlan, n_images: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return dtype name, shape and bytes per value of a shard's tensors, in file order."""
    code, size = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}[plan.dtype]
    shapes: dict[str, tuple[str, tuple[int, ...], int]] = {}
    per_token = [spec.rows_per_image for spec in plan.hooks if spec.per_token]
    if plan.tokens.random and per_token:
        shapes[TOKEN_ROWS] = ("I32", (n_images, max(per_token)), 4)
    for spec in plan.hooks:
        shapes[spec.name] = (code, (n_images, spec.rows_per_image, spec.d_in), size)
    return shapes


def _entry(fields: Fields, task: ShardTask, plan: StorePlan) -> ShardEntry:
    expect(fields, "file", task.file)
    expect(fields, "marker", task.marker)
    n_images = fields.number("n_images", most=task.stop - task.start)
    rows = fields.object("rows")
    for spec in plan.hooks:
        expect(rows, spec.name, n_images * spec.rows_per_image)
    return ShardEntry(
        n_images=n_images,
        bytes=_size(fields, plan, n_images),
        sha256=fields.hash("sha256", 64),
        marker_sha256=fields.hash("marker_sha256", 64),
    )


def _size(fields: Fields, plan: StorePlan, n_images: int) -> int:
    """Return the size of a shard, which has to have room for its tensors."""
    shapes = tensor_shapes(plan, n_images).values()
    return fields.number("bytes", least=sum(prod(shape) * size for _, shape, size in shapes))


def _bad_image(fields: Fields, task: ShardTask) -> BadImage:
    index = fields.number("index", least=task.start, most=task.stop - 1)
    return BadImage(index, fields.text("id"), fields.text("reason"))


def _checksums(fields: Fields, plan: StorePlan, n_images: int) -> dict[str, tuple[str, ...]]:
    n_chunks = -(-n_images // plan.images_per_chunk)
    found = {}
    for name in tensor_shapes(plan, n_images):
        values = fields.texts(name)
        if len(values) != n_chunks:
            raise fields.error(name, f"{n_chunks} of them", str(len(values)))
        found[name] = tuple(values)
    return found
