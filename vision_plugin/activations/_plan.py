"""The plan of an extraction: what it computes, and the shard tasks that divide the work."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from vision_plugin.activations._errors import ManifestError
from vision_plugin.activations._fields import Fields
from vision_plugin.activations._files import sha256, to_json

FORMAT = "vision_plugin.activations"
MAJOR, MINOR = 1, 0
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_IMAGES_PER_SHARD = 10_000_000
MAX_WIDTH = 10_000_000
MAX_SHARDS = 150_000
"""As many as a manifest can list within the limits of JSON that is read."""
MAX_IMAGES_WRITTEN = 500_000
"""Images of a shard that is written: its marker, with ids and labels, has to be readable."""
MAX_HOOKS = 10_000
MAX_SOURCE_BYTES = 2**20
"""Size of what a plan says of the images, as JSON."""
_SHARD_FILE = re.compile(r"shard-([0-9]{5,7})\.(?:json|safetensors)")


@dataclass(frozen=True)
class HookSpec:
    """Name and shape of the activations at one hook point."""

    name: str
    """Hook name, as in ``model.hook_dict``."""
    d_in: int
    """Width of a row."""
    rows_per_image: int
    """Rows per image: its selected tokens, or 1 for a pooled activation."""
    per_token: bool
    """Whether the rows are tokens."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.rows_per_image < 1:
            raise ValueError(f"{self.name} gives {self.rows_per_image} rows of {self.d_in} values")


@dataclass(frozen=True)
class ModelSpec:
    """The model that computed the activations."""

    name: str
    revision: str | None
    architecture: str
    weights: str
    """Hash of samples of all parameters; any training step changes it."""
    signature: tuple[float, ...]
    """Norms of some weight matrices, the same in every dtype; SAEs carry them too."""
    device: str
    """Kind of device; different kinds do not give the same bits."""


@dataclass(frozen=True)
class TokenSpec:
    """The selected tokens, and the model's tokens."""

    selection: str
    """Tokens kept: ``"cls"``, ``"patch"``, ``"register"``, ``"all"`` or ``"random:n"``."""
    n_cls: int
    n_registers: int
    grid: tuple[int, int]

    @property
    def random(self) -> bool:
        """Whether the tokens differ from image to image."""
        return self.selection.startswith("random:")


@dataclass(frozen=True)
class ShardTask:
    """The images of one shard: from ``start`` up to, not including, ``stop``.

    Examples:
        >>> task = vp.activations.ShardTask(index=0, start=0, stop=40)
        >>> task.file
        'shard-00000.safetensors'
    """

    index: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Name of the shard."""
        return f"shard-{self.index:05d}.safetensors"

    @property
    def marker(self) -> str:
        """Name of the marker, which says that the shard is complete and what is in it."""
        return f"shard-{self.index:05d}.json"


@dataclass(frozen=True)
class StorePlan:
    """All settings that determine a store's bytes. SPEC.md describes each field.

    Attributes:
        model: Model and revision.
        preprocessing: Hash of the preprocessing.
        image_size: Height and width of the pixels.
        hooks: Hooks with the widths of their activations.
        tokens: Tokens that are stored.
        dtype: Type that is stored.
        images: Kind, path and number of the images, and the hash of their ids.
        seed: Seed of random tokens.
        batch_size: Images per forward pass.
        images_per_shard: Images per shard.
        images_per_chunk: Images per chunk, which has a checksum of its own.

    Examples:
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo", images="demo:8", hook_names=[hook], output_path="planned-acts"
        ... )
        >>> plan = vp.activations.ShardMaker(cfg, model=model).plan()
        >>> plan.hook(hook)
        HookSpec(name='blocks.2.hook_resid_post', d_in=128, rows_per_image=65, per_token=True)
    """

    model: ModelSpec
    preprocessing: str
    image_size: tuple[int, int]
    hooks: tuple[HookSpec, ...]
    tokens: TokenSpec
    dtype: str
    images: dict[str, Any]
    seed: int
    batch_size: int
    images_per_shard: int
    images_per_chunk: int

    @property
    def n_images(self) -> int:
        """Images in the collection, bad ones included."""
        return int(self.images["n_images"])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The stored type."""
        return DTYPES[self.dtype]

    def hook(self, name: str) -> HookSpec:
        """Return name and shape of a hook's activations.

        Raises:
            ValueError: the hook is not in the store.
        """
        for spec in self.hooks:
            if spec.name == name:
                return spec
        names = ", ".join(spec.name for spec in self.hooks)
        raise ValueError(f"this store has no activations of {name!r}; it has {names}")

    @property
    def n_shards(self) -> int:
        """Number of shards that the store has once it is complete."""
        return -(-self.n_images // self.images_per_shard)

    def task(self, index: int) -> ShardTask:
        """Return a shard task by its number."""
        start = index * self.images_per_shard
        return ShardTask(index, start, min(start + self.images_per_shard, self.n_images))

    def tasks(self) -> Iterator[ShardTask]:
        """Yield the shard tasks; they do not depend on each other."""
        return map(self.task, range(self.n_shards))

    def task_of(self, file: str) -> ShardTask | None:
        """Return the task whose shard, or whose marker, has that name; None if none has."""
        match = _SHARD_FILE.fullmatch(file)
        if match is None or int(match.group(1)) >= self.n_shards:
            return None
        task = self.task(int(match.group(1)))
        return task if file in (task.file, task.marker) else None

    def marked_tasks(self, folder: Path) -> list[ShardTask]:
        """Return the tasks whose markers are in a folder, in order."""
        found = {task for path in folder.iterdir() if (task := self.task_of(path.name))}
        there = [task for task in found if os.path.lexists(folder / task.marker)]
        return sorted(there, key=lambda task: task.index)

    def to_json(self) -> dict[str, Any]:
        """Return the document that plan.json holds."""
        document = asdict(self)
        document["model"]["signature"] = list(self.model.signature)
        document["hooks"] = [asdict(spec) for spec in self.hooks]
        document["image_size"] = list(self.image_size)
        document["tokens"]["grid"] = list(self.tokens.grid)
        return {"format": FORMAT, "schema_version": f"{MAJOR}.{MINOR}", **document}

    @cached_property
    def sha256(self) -> str:
        """Hash of everything except the version; each shard carries its plan's hash."""
        document = self.to_json()
        del document["schema_version"]
        return sha256(to_json(document))

    @classmethod
    def from_json(cls, document: dict[str, Any], where: Path) -> StorePlan:
        """Read a plan strictly.

        Raises:
            ManifestError: the format or major version is another, or a field is missing or wrong.
        """
        fields = Fields(document, where)
        check_version(fields)
        hooks = tuple(_hook(entry) for entry in fields.objects("hooks", most=MAX_HOOKS))
        if not hooks or len({spec.name for spec in hooks}) != len(hooks):
            raise fields.error("hooks", "at least one hook, each once", f"{len(hooks)}")
        dtype = fields.text("dtype")
        if dtype not in DTYPES:
            raise fields.error("dtype", " or ".join(DTYPES), repr(dtype))
        images = fields.object("images")
        per_shard = fields.number("images_per_shard", least=1, most=MAX_IMAGES_PER_SHARD)
        images.number("n_images", least=1, most=MAX_SHARDS * per_shard)
        images.hash("ids_sha256", 64)
        if len(json.dumps(images.document)) > MAX_SOURCE_BYTES:
            raise fields.error("images", f"at most {MAX_SOURCE_BYTES:,} bytes", "more")
        return cls(
            model=_model(fields.object("model")),
            preprocessing=fields.text("preprocessing"),
            image_size=_pair(fields, "image_size"),
            hooks=hooks,
            tokens=_tokens(fields.object("tokens")),
            dtype=dtype,
            images=images.document,
            seed=fields.number("seed"),
            batch_size=fields.number("batch_size", least=1),
            images_per_shard=per_shard,
            images_per_chunk=fields.number("images_per_chunk", least=1, most=MAX_IMAGES_PER_SHARD),
        )

    def differences(self, other: StorePlan) -> list[str]:
        """Return differences as ``field: mine there, other's here``; image paths may differ."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        names = dict.fromkeys([*mine, *theirs])
        return [
            f"{name}: {mine.get(name)!r} there, {theirs.get(name)!r} here"
            for name in names
            if mine.get(name) != theirs.get(name)
            and name not in ("images.path", "model.signature", "model.name")
        ]


def check_version(fields: Fields) -> None:
    """Raise for another format, or a major version that this code does not know.

    Raises:
        ManifestError: the message says what was expected and what was found.
    """
    if fields.text("format") != FORMAT:
        raise fields.error("format", repr(FORMAT), repr(fields.document["format"])[:80])
    version = fields.text("schema_version")
    major, _, minor = version.partition(".")
    if not (major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
        raise fields.error("schema_version", "two numbers like '1.0'", repr(version)[:80])
    if major != str(MAJOR):
        raise ManifestError(
            f"{fields.where}: schema_version: expected {MAJOR}.x, found {version[:20]}. Another "
            "version of vision_plugin wrote this store: install that one, or extract again"
        )


def _model(fields: Fields) -> ModelSpec:
    return ModelSpec(
        name=fields.text("name"),
        revision=fields.optional_text("revision"),
        architecture=fields.text("architecture"),
        weights=fields.text("weights"),
        signature=tuple(fields.floats("signature")),
        device=fields.text("device"),
    )


def _hook(fields: Fields) -> HookSpec:
    return HookSpec(
        name=fields.text("name"),
        d_in=fields.number("d_in", least=1, most=MAX_WIDTH),
        rows_per_image=fields.number("rows_per_image", least=1, most=MAX_WIDTH),
        per_token=fields.flag("per_token"),
    )


def _tokens(fields: Fields) -> TokenSpec:
    from vision_plugin.models import TokenSelection

    selection = fields.text("selection")
    try:
        TokenSelection.parse(selection)
    except ValueError as error:
        raise fields.error("selection", "a kind of token", repr(selection)[:80]) from error
    found = TokenSpec(
        selection=selection,
        n_cls=fields.number("n_cls", most=MAX_WIDTH),
        n_registers=fields.number("n_registers", most=MAX_WIDTH),
        grid=_pair(fields, "grid"),
    )
    if prod(found.grid) > MAX_WIDTH:
        raise fields.error("grid", f"at most {MAX_WIDTH:,} patches", str(list(found.grid)))
    return found


def _pair(fields: Fields, name: str) -> tuple[int, int]:
    values = fields.numbers(name)
    if len(values) != 2:
        raise fields.error(name, "two numbers", str(values)[:80])
    return values[0], values[1]


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
