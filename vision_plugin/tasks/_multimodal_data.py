"""What a steering task on a vision-language model runs on: images, questions, right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AskedImages:
    """Images with the right answer to each question.

    Attributes:
        images: The images.
        labels: Number of the right answer among the values, by factor.

    Examples:
        >>> from vision_plugin.demo.multimodal import asked
        >>> data = asked(4, seed=0)
        >>> len(data.images), sorted(data.labels)
        (4, ['background', 'colour', 'shape', 'texture'])
    """

    images: Sequence[Image]
    labels: Mapping[str, Int[Tensor, " n"]]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class MultimodalData:
    """Questions whose answers are one word, and images of three splits.

    Attributes:
        questions: Question by factor.
        values: Answers that a question may have, by factor.
        train: Images on which latents, neurons and directions are found.
        validation: Images on which number and strength are chosen.
        test: Images that are reported on.
        locator: Factor whose latents show where the object is.
        beside: Factors that are seen beside the object, such as the background.

    Examples:
        >>> from vision_plugin.demo.multimodal import multimodal_data
        >>> data = multimodal_data(train=100, validation=4, test=4)
        >>> data.questions["colour"], data.locator
        ('What colour is shown?', 'colour')
    """

    questions: Mapping[str, str]
    values: Mapping[str, tuple[str, ...]]
    train: AskedImages
    validation: AskedImages
    test: AskedImages
    locator: str
    beside: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if set(self.questions) != set(self.values) or len(self.questions) < 2:
            raise ValueError(
                "questions= and values= must name the same two factors or more: a change of one "
                "answer is judged by what happens to the others"
            )
        if self.locator not in self.questions:
            raise ValueError(f"locator={self.locator!r} is none of {', '.join(self.questions)}")
        for name in ("train", "validation", "test"):
            split: AskedImages = getattr(self, name)
            for factor, values in self.values.items():
                seen = split.labels[factor]
                if len(seen) != len(split) or int(seen.max()) >= len(values):
                    raise ValueError(f"labels of {factor} do not fit the {name} images or values")
        missing = [
            factor
            for factor, values in self.values.items()
            if len(torch.unique(self.train.labels[factor])) < len(values)
        ]
        if missing:
            raise ValueError(f"a value of {missing[0]} has no training image: take more images")
