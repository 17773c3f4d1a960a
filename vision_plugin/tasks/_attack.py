"""Images with a misleading word and the same images without it: what a typographic task runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Attack:
    """Pairs of images.

    Attributes:
        clean: Pixels without a word.
        attacked: Pixels of the same images with a word that names another class.
        labels: True class of each image.
        printed: Class that the word names.

    Examples:
        >>> from vision_plugin.demo.attacks import attack
        >>> pairs = attack(model, "shape", 4, seed=0)
        >>> pairs.clean.shape, bool((pairs.labels != pairs.printed).all())
        (torch.Size([4, 3, 64, 64]), True)
    """

    clean: Float[Tensor, "n channels height width"]
    attacked: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    printed: Int[Tensor, " n"]

    def __post_init__(self) -> None:
        if len(self.labels) == 0:
            raise ValueError("a split has no images: draw or name more")
        if bool((self.labels == self.printed).any()):
            raise ValueError("a printed word names the image's own class, which misleads nobody")

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, mask: Bool[Tensor, " n"]) -> Attack:
        """Return some of the pairs.

        Raises:
            ValueError: there is none.
        """
        return Attack(self.clean[mask], self.attacked[mask], self.labels[mask], self.printed[mask])

    def printing(self, classes: Int[Tensor, " words"]) -> Attack:
        """Return the pairs whose word names one of some classes."""
        return self.where(torch.isin(self.printed, classes))


@dataclass(frozen=True, eq=False)
class TypographicData:
    """One kind of attack: what is asked, and the images of the three splits.

    Attributes:
        kind: What the words name, such as ``"shape"``.
        classes: Names of the classes.
        prompts: Sentence about each class.
        train: Pairs in which latents, directions and heads are found.
        validation: Pairs on which rules and sizes are chosen.
        test: Pairs that are reported on.
        others: Sentences about other questions, whose answers should stay, by question.

    Examples:
        >>> from vision_plugin.demo.attacks import typographic_data
        >>> data = typographic_data(model, "shape", train=8, validation=4, test=4)
        >>> data.prompts[0], len(data.train.labels)
        ('a picture of a circle', 8)
    """

    kind: str
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    train: Attack
    validation: Attack
    test: Attack
    others: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.prompts) or len(self.classes) < 4:
            raise ValueError(
                f"{self.kind}: {len(self.classes)} classes with {len(self.prompts)} prompts; a "
                "typographic task needs four classes or more, with a prompt for each"
            )

    def halves(self) -> tuple[tuple[TypographicData, Attack], tuple[TypographicData, Attack]]:
        """Return both ways of leaving half of the words out.

        Returns:
            Twice: the data with the words of one half in every split, and the test pairs with the
            words of the other half, which nothing was found or chosen on.
        """
        every = torch.arange(len(self.classes))
        sides = (every[0::2], every[1::2]), (every[1::2], every[0::2])
        first, second = (
            (self.with_words(seen, seen), self.test.printing(unseen)) for seen, unseen in sides
        )
        return first, second

    def apart(self) -> TypographicData:
        """Return the data with other words in validation than in training.

        What is chosen on it does well on words that it was not found with.
        """
        words = self.train.printed.unique()
        return self.with_words(words[0::2], words[1::2])

    def with_words(self, train: Tensor, validation: Tensor) -> TypographicData:
        """Return the data with some words in training and some in validation and test."""
        return TypographicData(
            self.kind,
            self.classes,
            self.prompts,
            self.train.printing(train),
            self.validation.printing(validation),
            self.test.printing(validation),
            others=self.others,
        )
