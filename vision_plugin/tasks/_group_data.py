"""Images in four groups: a label that is asked, and a nuisance that goes along with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin.tasks._measure import LEAST

GROUPS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Label and nuisance of each group, in the order of their numbers."""


@dataclass(frozen=True, eq=False)
class GroupSplit:
    """Images of one split.

    Attributes:
        pixels: Images prepared by ``model.preprocess``.
        labels: What is asked: 0 or 1.
        nuisance: What goes along with it in training: 0 or 1.
        others: Values of other attributes, whose answers should stay, by attribute.

    Examples:
        >>> split = vp.tasks.GroupSplit(pixels, torch.arange(8) % 2, torch.arange(8) // 4)
        >>> split.groups.tolist(), split.sizes
        ([0, 2, 0, 2, 1, 3, 1, 3], (2, 2, 2, 2))
    """

    pixels: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " _"]
    nuisance: Int[Tensor, " _"]
    others: Mapping[str, Int[Tensor, " _"]] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        n = len(self.pixels)
        named = {"labels": self.labels, "nuisance": self.nuisance, **self.others}
        for name, values in named.items():
            if len(values) != n:
                raise ValueError(f"{name}= has {len(values)} entries for {n} images")
        for name in ("labels", "nuisance"):
            values = named[name]
            if bool(((values != 0) & (values != 1)).any()):
                raise ValueError(f"{name}= must be 0 or 1 for each image: the task has four groups")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def groups(self) -> Int[Tensor, " n"]:
        """Number of each image's group, as :data:`GROUPS` counts them."""
        return 2 * self.labels.long() + self.nuisance.long()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of images in each group."""
        sizes: list[int] = torch.bincount(self.groups, minlength=len(GROUPS)).tolist()
        return tuple(sizes)

    def where(self, rows: Int[Tensor, " m"] | Bool[Tensor, " n"]) -> GroupSplit:
        """Return some of the images."""
        others = {name: values[rows] for name, values in self.others.items()}
        return GroupSplit(self.pixels[rows], self.labels[rows], self.nuisance[rows], others)

    def balanced(self, seed: int = 0) -> GroupSplit:
        """Return as many images of each group as the smallest group has."""
        generator = torch.Generator().manual_seed(seed)
        rows = [(self.groups == group).nonzero().flatten() for group in range(len(GROUPS))]
        n = min(map(len, rows))
        return self.where(
            torch.cat([of[torch.randperm(len(of), generator=generator)[:n]] for of in rows])
        )


@dataclass(frozen=True, eq=False)
class GroupData:
    """A label and a nuisance that go together in training, with the images of three splits.

    Attributes:
        kind: What is asked, such as ``"shape"``.
        nuisance: What goes along with it, such as ``"background"``.
        classes: Both values of what is asked.
        values: Both values of the nuisance.
        train: Biased images, which the probe is fitted on and latents are found in.
        validation: Images on which rules and sizes are chosen.
        test: Images that are reported on.
        balanced: Images without the bias, for the probe that shows what is possible; None takes
            from ``train`` as many of each group as its smallest group has.

    Raises:
        ValueError: a group has no image, or too few for an interval where they are reported on.

    Examples:
        >>> from vision_plugin.demo.groups import group_data
        >>> data = group_data(model, "background", usual=8, unusual=2, validation=30, test=30)
        >>> data.group_names
        ('circle, night', 'circle, sand', 'square, night', 'square, sand')
    """

    kind: str
    nuisance: str
    classes: tuple[str, str]
    values: tuple[str, str]
    train: GroupSplit
    validation: GroupSplit
    test: GroupSplit
    balanced: GroupSplit | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            check_sizes(getattr(self, name).sizes, self.group_names, name)

    @property
    def group_names(self) -> tuple[str, ...]:
        """Name of each group, such as ``"circle, night"``."""
        return tuple(f"{self.classes[y]}, {self.values[a]}" for y, a in GROUPS)


def check_sizes(sizes: Sequence[int], names: Sequence[str], split: str) -> None:
    """Raise ValueError if a group has no image, or too few for an interval on the test split."""
    n = min(sizes)
    group = names[list(sizes).index(n)]
    if n == 0:
        raise ValueError(
            f"the {split} split has no image of the group ({group}): worst-group accuracy needs "
            "all four groups in every split, so give more images, or another label or nuisance"
        )
    if split == "test" and n < LEAST:
        raise ValueError(
            f"the test split has {n} images of the group ({group}), too few for an interval, which "
            f"needs {LEAST}: make the split larger"
        )
