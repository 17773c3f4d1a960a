"""What a concept bottleneck reads: image-level latents, neurons, embeddings and classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_json
from vision_plugin.evaluation import class_of_images, evaluate
from vision_plugin.lens._names import FeatureNames

LEAST_OF_A_CLASS = 10
"""Fewest images of a class that a bottleneck is fitted and tested on."""
MAX_NAMES_BYTES = 64 * 2**20
PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Codes:
    """Sparse rows of latents, of which some rows at a time are made dense.

    Attributes:
        sparse: Latents in CSR form, ``[n, d_sae]``.
        scale: Number that every latent is multiplied with.
    """

    sparse: Tensor
    scale: float = 1.0

    def __len__(self) -> int:
        return int(self.sparse.shape[0])

    @property
    def width(self) -> int:
        """Number of latents."""
        return int(self.sparse.shape[1])

    def dense(self, rows: Int[Tensor, " m"]) -> Float[Tensor, "m d_sae"]:
        """Return the latents of some images, scaled."""
        ends = self.sparse.crow_indices()
        starts, lengths = ends[rows], ends[rows + 1] - ends[rows]
        line = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        before = lengths.cumsum(0) - lengths
        within = torch.arange(len(line)) - torch.repeat_interleave(before, lengths)
        at = torch.repeat_interleave(starts, lengths) + within
        found = torch.zeros(len(rows), self.width)
        found[line, self.sparse.col_indices()[at]] = self.sparse.values()[at].float()
        return found * self.scale

    def firing(self, rows: Int[Tensor, " m"]) -> Float[Tensor, " d_sae"]:
        """Return on which share of some images each latent fires."""
        count = torch.zeros(self.width)
        for some in rows.split(4096):
            count += (self.dense(some) != 0).sum(0)
        return count / max(1, len(rows))

    def mean_norm(self, rows: Int[Tensor, " m"]) -> float:
        """Return the mean norm of some images' latents."""
        norms = [self.dense(some).norm(dim=1) for some in rows.split(4096)]
        return float(torch.cat(norms).mean())


@dataclass(frozen=True, eq=False)
class LabelledCodes:
    """Images as an SAE, its neurons and the model's embedding see them, with their classes.

    Attributes:
        ids: Ids of the images.
        codes: Latents pooled over tokens.
        neurons: Activations pooled over tokens, ``[n, d_in]``.
        embeddings: Unit embeddings ``[n, d]``.
        labels: Number of each image's class.
        classes: Names of the classes.
        groups: Name of each image's group; the classes by default.
    """

    ids: Sequence[str]
    codes: Codes
    neurons: Float[Tensor, "n d_in"]
    embeddings: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    classes: Sequence[str]
    groups: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)


def read_codes(
    model: Any,
    sae: Any,
    images: Any,
    *,
    labels: str | None,
    groups: str | None,
    batch_size: int,
    pooling: str,
    progress: bool,
) -> LabelledCodes:
    """Run images through the package's one loop, and keep what a bottleneck needs.

    Args:
        model: A VisionBridge.
        sae: An SAE in hand.
        images: An image source.
        labels: Column of the classes as ``column:NAME``; None takes the images' labels.
        groups: Column of groups as ``column:NAME``; None takes the classes.
        batch_size: Images per forward pass.
        pooling: ``"max"`` or ``"mean"`` over tokens.
        progress: Whether to show how far it is.

    Raises:
        ValueError: there are no labels, or a class has too few images.
    """
    of_image = class_of_images(images, labels)
    of_group = of_image if groups is None else class_of_images(images, groups)
    check_classes(of_image)
    found = evaluate(
        sae,
        model,
        images,
        metrics=["sparsity"],
        controls=(),
        batch_size=batch_size,
        pooling=pooling,
        progress=progress,
    ).encoded
    kept = [row for row, index in enumerate(found.indices) if of_image[index]]
    names = [of_image[found.indices[row]] for row in kept]
    check_classes(names)
    classes = sorted(set(names))
    number = {name: place for place, name in enumerate(classes)}
    rows = torch.tensor(kept)
    return LabelledCodes(
        ids=[found.ids[row] for row in kept],
        codes=Codes(_rows_of(found.latents, rows)),
        neurons=found.neurons[rows].float(),
        embeddings=found.first_embeddings[rows].float(),
        labels=torch.tensor([number[name] for name in names]),
        classes=classes,
        groups=[of_group[found.indices[row]] for row in kept],
    )


def check_classes(names: Sequence[str]) -> None:
    """Raise ValueError unless there are two classes or more, each with enough images."""
    counts = Counter(name for name in names if name)
    if len(counts) < 2:
        raise ValueError(
            f"the images have {len(counts)} classes, and a bottleneck tells at least two apart: "
            "name a column of classes with labels=column:NAME"
        )
    name, least = min(counts.items(), key=lambda item: item[1])
    if least < LEAST_OF_A_CLASS:
        raise ValueError(
            f"the class {name!r} has {least} images, and a bottleneck needs {LEAST_OF_A_CLASS} of "
            "each class: leave that class out, or give more images"
        )


def _rows_of(sparse: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of a CSR matrix, ascending."""
    if len(rows) == sparse.shape[0]:
        return sparse
    ends = sparse.crow_indices()
    lengths = (ends[1:] - ends[:-1])[rows]
    keep = torch.zeros(int(sparse.shape[0]), dtype=torch.bool)
    keep[rows] = True
    inside = torch.repeat_interleave(keep, ends[1:] - ends[:-1])
    return torch.sparse_csr_tensor(
        torch.cat([torch.zeros(1, dtype=ends.dtype), lengths.cumsum(0)]),
        sparse.col_indices()[inside],
        sparse.values()[inside],
        (len(rows), int(sparse.shape[1])),
        check_invariants=False,
    )


def parts_of(
    labels: Int[Tensor, " n"], shares: tuple[float, float], seed: int
) -> dict[str, Int[Tensor, " m"]]:
    """Return the images of training, validation and test, each class in the same proportions.

    Args:
        labels: Number of each image's class.
        shares: Share of all images for validation and for test.
        seed: Seed of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in PARTS}
    for value in torch.unique(labels).tolist():
        own = (labels == value).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        held = [max(1, round(len(own) * share)) for share in shares]
        parts["validation"].append(own[: held[0]])
        parts["test"].append(own[held[0] : sum(held)])
        parts["train"].append(own[sum(held) :])
    return {name: torch.cat(found).sort().values for name, found in parts.items()}


def read_concept_names(names: Any, d_sae: int) -> dict[int, str]:
    """Return names of latents by their numbers.

    Args:
        names: Names of ``vp.name_features``; a list with a text per latent; a mapping from latents
            to texts, or to objects with a ``name``; the path of a JSON file with one of these,
            below ``names`` or ``latents`` where it holds more; or None.
        d_sae: Number of latents.

    Raises:
        ValueError: names are of another form, or name a latent that there is not.
    """
    if names is None:
        return {}
    if isinstance(names, FeatureNames):
        names = names.texts()
    if isinstance(names, (str, Path)):
        path = local_path(names)
        names = read_json(path, limit=MAX_NAMES_BYTES)
    if isinstance(names, Mapping):
        inside = next((names[key] for key in ("names", "latents") if key in names), names)
    else:
        inside = names
    pairs = inside.items() if isinstance(inside, Mapping) else enumerate(inside)
    found: dict[int, str] = {}
    for key, value in pairs:
        if isinstance(value, Mapping):
            key = value.get("latent", key)
            value = value.get("name")
        if not re.fullmatch(r"\d{1,9}", str(key)) or int(key) >= d_sae:
            raise ValueError(
                f"names= names {str(key)[:40]!r}, but the SAE's latents are 0 to {d_sae - 1}: give "
                "a mapping from latents to names"
            )
        if value is not None and not isinstance(value, str):
            raise ValueError(f"names= gives latent {key} a {type(value).__name__}: give a text")
        if value:
            found[int(key)] = " ".join(value.split())
    return found


def latents_named(concepts: Sequence[int | str], names: Mapping[int, str], d_sae: int) -> list[int]:
    """Return the latents that are meant by numbers or by names; one name may be several latents'.

    Raises:
        ValueError: there is no such latent or name.
    """
    found: list[int] = []
    for concept in concepts:
        if isinstance(concept, int) or re.fullmatch(r"\d{1,9}", str(concept)):
            if not 0 <= int(concept) < d_sae:
                raise ValueError(f"there is no latent {concept}: the SAE has {d_sae}, from 0")
            found.append(int(concept))
            continue
        own = [latent for latent, name in names.items() if name == concept]
        if not own:
            known = ", ".join(sorted(set(names.values()))[:8]) or "no latent has a name"
            raise ValueError(f"no latent is named {concept!r}: there are {known}")
        found += own
    return list(dict.fromkeys(found))
