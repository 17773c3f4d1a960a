"""Images with several known factors, and what reads the factors off embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin.steering import EditPass
from vision_plugin.tasks._measure import unit
from vision_plugin.tasks._probe import Probe


@dataclass(frozen=True, eq=False)
class FactorSplit:
    """Images of one split.

    Attributes:
        pixels: Images prepared by ``model.preprocess``.
        values: Number of each image's value, by factor.

    Raises:
        ValueError: there are no factors, or a factor has another number of entries than images.

    Examples:
        >>> split = vp.tasks.FactorSplit(pixels, {"texture": torch.arange(8) % 4})
        >>> split.pixels.shape
        torch.Size([8, 3, 64, 64])
    """

    pixels: Float[Tensor, "n channels height width"]
    values: Mapping[str, Int[Tensor, " _"]]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values= is empty: give the value of each image, by factor")
        for name, values in self.values.items():
            if len(values) != len(self.pixels):
                raise ValueError(
                    f"values= has {len(values)} entries of {name} for {len(self.pixels)} images"
                )

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, eq=False)
class FactorData:
    """Factors with their values, and the images of the splits; no image is in two splits.

    Attributes:
        factors: Names of the values, by factor.
        train: Images in which latents, directions and rotations are found.
        validation: Images on which sizes and layers are chosen.
        test: Images that are reported on.
        readers: Images on which a linear probe is fitted for each factor; None for zero-shot.
        prompts: Sentence about each value, by factor, for zero-shot reading of a model with text.

    Raises:
        ValueError: there are fewer than two factors, a factor has one value in a split, or nothing
            says how a factor is read.

    Examples:
        >>> values = {"texture": torch.arange(8) % 2, "size": torch.arange(8) // 2 % 2}
        >>> split = vp.tasks.FactorSplit(pixels, values)
        >>> names = {"texture": ("plain", "striped"), "size": ("small", "large")}
        >>> data = vp.tasks.FactorData(
        ...     names, train=split, validation=split, test=split, readers=split
        ... )
        >>> list(data.splits)
        ['train', 'validation', 'test', 'readers']
    """

    factors: Mapping[str, tuple[str, ...]]
    train: FactorSplit
    validation: FactorSplit
    test: FactorSplit
    readers: FactorSplit | None = None
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if len(self.factors) < 2:
            raise ValueError(
                f"{len(self.factors)} factors: to swap one and leave the others needs two or more"
            )
        for name, split in self.splits.items():
            missing = [factor for factor in self.factors if factor not in split.values]
            if missing:
                raise ValueError(f"the {name} split has no values of the factor {missing[0]!r}")
            for factor, names in self.factors.items():
                found = split.values[factor].unique()
                if len(found) < 2:
                    raise ValueError(
                        f"every image of the {name} split has one value of {factor!r}, so there is "
                        "nothing to swap: leave the factor out, or give images with several values"
                    )
                if int(found.min()) < 0 or int(found.max()) >= len(names):
                    raise ValueError(f"{factor!r} has values that factors= has no name for")
        unread = [factor for factor in self.factors if factor not in self.prompts]
        if self.readers is None and unread:
            raise ValueError(
                f"nothing reads the factor {unread[0]!r}: give a sentence about each value in "
                "prompts=, or images to fit probes on in readers="
            )

    @property
    def splits(self) -> dict[str, FactorSplit]:
        """The splits by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return found if self.readers is None else {**found, "readers": self.readers}


class Readers:
    """Reads every factor off unit embeddings: by a probe, or zero-shot.

    Args:
        model: A VisionBridge.
        data: The factors; probes are fitted on ``data.readers`` where it has them.
        batch_size: Images that run at once.

    Raises:
        ValueError: there are prompts and no probes, and the model has no text tower.
    """

    def __init__(self, model: Any, data: FactorData, batch_size: int) -> None:
        self.model = model
        self._texts: dict[str, Tensor] = {}
        self._probes: dict[str, Probe] = {}
        if data.readers is None:
            if not model.adapter.has_joint_space:
                raise ValueError(
                    f"{model.cfg.model_name} has no space shared with text, so factors cannot be "
                    "read zero-shot: give images to fit probes on in readers="
                )
            for factor in data.factors:
                texts = model.encode_text(list(data.prompts[factor]))
                self._texts[factor] = texts.float().cpu()
            return
        run = EditPass(model, data.readers.pixels, batch_size=batch_size)
        embedded = unit(run.embed())
        for factor in data.factors:
            self._probes[factor] = Probe.fit(embedded, data.readers.values[factor])

    @property
    def kind(self) -> str:
        """``"probes"`` or ``"zero-shot"``."""
        return "probes" if self._probes else "zero-shot"

    def logits(self, embedding: Float[Tensor, "n d"], factor: str) -> Float[Tensor, "n c"]:
        """Return logits of a factor's values; gradients flow."""
        found: Tensor
        if self._probes:
            found = self._probes[factor].logits(embedding)
        else:
            found = self.model.zero_shot_logits(embedding, self._texts[factor].to(embedding))
        return found

    def answers(self, embedding: Float[Tensor, "n d"], factor: str) -> Int[Tensor, " n"]:
        """Return the number of the value that is read of each image."""
        return self.logits(embedding, factor).argmax(1)

    def right(self, embedding: Float[Tensor, "n d"], split: FactorSplit) -> Bool[Tensor, " n"]:
        """Return whether every factor of an image is read right."""
        each = [
            self.answers(embedding, factor) == split.values[factor]
            for factor in (self._probes or self._texts)
        ]
        return torch.stack(each).all(0)
