"""``ActivationStore`` reads a store on disk as activations by hook and image."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._paths import local_path
from vision_plugin.activations._batches import ShuffledBatches
from vision_plugin.activations._errors import StoreMismatchError
from vision_plugin.activations._files import sha256
from vision_plugin.activations._plan import HookSpec, StorePlan
from vision_plugin.activations._records import (
    MANIFEST,
    PLAN,
    TOKEN_ROWS,
    BadImage,
    read_manifest,
    read_marker,
    read_plan,
)
from vision_plugin.activations._remote import RemoteFolder, is_url
from vision_plugin.activations._shards import Shard
from vision_plugin.activations._windows import ReadableStore

logger = logging.getLogger(__name__)


class ActivationStore(ReadableStore):
    """Activations that :func:`extract` stored, read and checked when they are asked for.

    If its extraction was interrupted, a store opens with the shards that are complete.

    Examples:
        >>> store = vp.activations.ActivationStore("acts")
        >>> store.activations("blocks.2.hook_resid_post", [0, 7]).shape
        torch.Size([2, 65, 128])
    """

    def __init__(self, path: str | Path) -> None:
        """Open a store in a folder or in object storage; shards are copied from there when read.

        Raises:
            FileNotFoundError: there is no such folder, or no store in it.
            ManifestError: the manifest is damaged, or of another major version.
            ShardError: a file is missing, or is a link and not a plain file.
        """
        remote = RemoteFolder(str(path)) if is_url(path) else None
        folder = local_path(path) if remote is None else remote.copies
        if remote is not None:
            remote.pull(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder that exists")
        if not (folder / MANIFEST).exists() and not (folder / PLAN).exists():
            raise FileNotFoundError(
                f"{path} holds neither {MANIFEST} nor {PLAN}, so it is no activation store"
            )
        self.paths: tuple[Path, ...] = (folder,)
        self.plan, self._shards, self.complete = _open(folder)
        for shard in self._shards:
            shard.remote = remote

    @classmethod
    def concatenate(cls, stores: Sequence[ActivationStore]) -> ActivationStore:
        """Join several stores into one, their images in order.

        Raises:
            StoreMismatchError: they differ in model, preprocessing, hooks, tokens or dtype.
            ValueError: ``stores`` is empty.
        """
        if not stores:
            raise ValueError("there are no stores to concatenate")
        first = stores[0]
        for other in stores[1:]:
            differences = [
                difference
                for difference in first.plan.differences(other.plan)
                if difference.startswith(("model.", "preprocessing", "hooks", "tokens", "dtype"))
                and not difference.startswith("model.device")
            ]
            if differences:
                raise StoreMismatchError(
                    f"{other.paths[0]} cannot be put behind {first.paths[0]}: "
                    f"{'; '.join(differences)}"
                )
        joined = cls.__new__(cls)
        joined.paths = tuple(path for store in stores for path in store.paths)
        joined.plan = first.plan
        joined._shards = [shard for store in stores for shard in store._shards]
        joined.complete = all(store.complete for store in stores)
        return joined

    # ------------------------------------------------------------------ contents

    def __len__(self) -> int:
        """Number of images."""
        return self.starts[-1]

    @property
    def hook_names(self) -> list[str]:
        """Hook points with activations in the store."""
        return [spec.name for spec in self.plan.hooks]

    def spec(self, hook_name: str) -> HookSpec:
        """Return name, width and rows per image of a hook.

        Raises:
            ValueError: the hook is not in the store.
        """
        return self.plan.hook(hook_name)

    def d_in(self, hook_name: str) -> int:
        """Return the width of the activations at a hook."""
        return self.spec(hook_name).d_in

    def n_rows(self, hook_name: str) -> int:
        """Return the number of activation vectors at a hook."""
        return len(self) * self.spec(hook_name).rows_per_image

    @cached_property
    def ids(self) -> list[str]:
        """Id of each image."""
        return [id for shard in self._shards for id in shard.record.ids]

    @cached_property
    def labels(self) -> list[str] | None:
        """Label of each image, or None where the collection has none."""
        found: list[str] = []
        for shard in self._shards:
            if shard.record.labels is None and shard.n_images:
                return None
            found += shard.record.labels or ()
        return found

    @property
    def image_indices(self) -> Int[Tensor, "n"]:
        """Number of each image in its collection; bad images leave gaps."""
        found = [i for shard in self._shards for i in shard.record.image_indices(shard.task)]
        return torch.tensor(found, dtype=torch.long)

    @property
    def bad_images(self) -> list[BadImage]:
        """Images that are not in the store, each with the reason."""
        return [bad for shard in self._shards for bad in shard.record.bad_images]

    @property
    def shards(self) -> Sequence[Shard]:
        """The complete shards."""
        return tuple(self._shards)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the store's contents."""
        parts = [f"{shard.plan.sha256} {shard.sha256}\n" for shard in self._shards]
        return sha256("".join(parts).encode())[:16]

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first image of each shard, then the number of images."""
        return [0, *accumulate(shard.n_images for shard in self._shards)]

    # ------------------------------------------------------------------ reading

    def activations(
        self, hook_name: str, images: int | slice | Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "n rows d_in"]:
        """Return the activations of some images, or of all, in the stored type.

        A slice within one shard is mapped from the file without copying.

        Args:
            hook_name: One of ``hook_names``.
            images: Number, slice or numbers of images; None takes all.

        Raises:
            ShardError: a shard of these images is missing or damaged.
            IndexError: there is no such image.
        """
        self.spec(hook_name)
        return self._tensor(hook_name, images)

    def token_rows(
        self, images: int | slice | Sequence[int] | Tensor | None = None
    ) -> Int[Tensor, "n rows"]:
        """Return the model's token that each row of an image holds."""
        if self.plan.tokens.random:
            return self._tensor(TOKEN_ROWS, images).long()
        from vision_plugin.models import TokenLayout

        tokens = self.plan.tokens
        layout = TokenLayout(tokens.n_cls, tokens.n_registers, tokens.grid)
        return layout.indices(tokens.selection).expand(len(self._numbers(images)), -1)

    def _tensor(self, name: str, images: int | slice | Sequence[int] | Tensor | None) -> Tensor:
        numbers = self._numbers(images)
        parts = [shard.tensor(name, part) for shard, part in self._runs(numbers)]
        if not parts:
            return self._shards[0].tensor(name, range(0)) if self._shards else torch.empty(0, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _numbers(self, images: int | slice | Sequence[int] | Tensor | None) -> Sequence[int]:
        if images is None:
            return range(len(self))
        if isinstance(images, int):
            images = [images]
        if isinstance(images, slice):
            return range(len(self))[images]
        numbers = images.tolist() if isinstance(images, Tensor) else list(images)
        for number in numbers:
            if not -len(self) <= number < len(self):
                raise IndexError(f"image {number} of a store of {len(self)}")
        return [number % len(self) for number in numbers]

    def _runs(self, numbers: Sequence[int]) -> Iterator[tuple[Shard, range]]:
        """Yield runs of consecutive images of one shard, in the order of the numbers."""
        place = 0
        while place < len(numbers):
            shard = bisect.bisect_right(self.starts, numbers[place]) - 1
            first = numbers[place]
            length = 1
            while (
                place + length < len(numbers)
                and numbers[place + length] == first + length
                and first + length < self.starts[shard + 1]
            ):
                length += 1
            start = first - self.starts[shard]
            yield self._shards[shard], range(start, start + length)
            place += length

    def batches(
        self,
        hook_names: str | Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        n_batches_in_buffer: int = 20,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> ShuffledBatches:
        """Return endless shuffled batches of exactly ``batch_size`` vectors.

        Every vector is served once before any is served again. The seed determines the order, and
        ``state_dict`` saves the position in it.

        Args:
            hook_names: One hook, for batches [batch_size, d_in]; or several, for dictionaries of
                such batches, whose rows belong to the same tokens.
            batch_size: Vectors per batch.
            seed: Seed of the order.
            n_batches_in_buffer: Buffer size in batches, 2 or more; it bounds the memory. Half of it
                is served while the other half is read.
            dtype: Type of the batches.
            device: Device of the batches.

        Raises:
            ValueError: no such hook, an empty store, or a buffer of fewer than two batches.
        """
        return ShuffledBatches(
            self,
            hook_names,
            batch_size,
            seed=seed,
            n_batches_in_buffer=n_batches_in_buffer,
            dtype=dtype,
            device=torch.device(device),
        )

    # ------------------------------------------------------------------ compatibility

    def metadata(self, hook_name: str) -> dict[str, Any]:
        """Return what an SAE that is trained on a hook's activations records about them."""
        spec, plan = self.spec(hook_name), self.plan
        return {
            "model_name": plan.model.name,
            "model_revision": plan.model.revision,
            "model_signature": list(plan.model.signature),
            "hook_name": hook_name,
            "d_in": spec.d_in,
            "tokens": plan.tokens.selection,
            "preprocessing": plan.preprocessing,
            "dataset_path": str(plan.images.get("path", plan.images.get("kind"))),
            "n_images": len(self),
            "context_size": plan.tokens.n_cls
            + plan.tokens.n_registers
            + plan.tokens.grid[0] * plan.tokens.grid[1],
        }

    def check_fits(self, expected: dict[str, Any]) -> None:
        """Raise unless the store fits an SAE or a configuration.

        Args:
            expected: Some keys of :meth:`metadata`, including ``hook_name``. Keys that are missing
                or None are not compared; the model's name is compared only without a
                ``model_signature``.

        Raises:
            StoreMismatchError: the message names both sides of every difference.
        """
        from vision_plugin.models.site import same_signature

        here = self.metadata(str(expected["hook_name"]))
        wrong = [
            f"{name}: {expected[name]!r} expected, {here[name]!r} in the store"
            for name in ("d_in", "tokens", "preprocessing")
            if expected.get(name) is not None and expected[name] != here[name]
        ]
        trained_on = expected.get("model_signature")
        if trained_on is not None:
            same = same_signature(list(trained_on), here["model_signature"])
        else:
            same = expected.get("model_name") in (None, here["model_name"])
        if not same:
            wrong.append(
                f"model: {expected.get('model_name')!r} expected, {here['model_name']!r} (other "
                "weights) in the store"
            )
        if wrong:
            raise StoreMismatchError(f"{self.paths[0]} does not fit: {'; '.join(wrong)}")

    def __repr__(self) -> str:
        state = "" if self.complete else ", incomplete"
        return (
            f"ActivationStore({', '.join(map(str, self.paths))}: {len(self):,} images at "
            f"{', '.join(self.hook_names)}, {self.plan.dtype}{state})"
        )


def _open(folder: Path) -> tuple[StorePlan, list[Shard], bool]:
    if (folder / MANIFEST).exists() or (folder / MANIFEST).is_symlink():
        manifest = read_manifest(folder)
        tasks = zip(manifest.plan.tasks(), manifest.shards, strict=True)
        shards = [Shard(folder, manifest.plan, task, entry=entry) for task, entry in tasks]
        return manifest.plan, shards, True
    plan = read_plan(folder)
    found = [
        Shard(folder, plan, task, record=read_marker(folder, plan, task))
        for task in plan.marked_tasks(folder)
    ]
    logger.warning(
        "%s is incomplete: %d of %d shards are there. Run the same extraction again to continue",
        *(folder, len(found), plan.n_shards),
    )
    return plan, found, False
