"""The result of SpLiCE: words of each image, the curve of cosine over L0, and editing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from vision_plugin._intervals import cell
from vision_plugin._rich import Table
from vision_plugin.lens._result_folder import save_result
from vision_plugin.lens._shares import Share, share_of
from vision_plugin.lens._splice_words import WordDictionary, uncentred_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10


@dataclass(frozen=True)
class SplicePoint:
    """One penalty: how many words images take, and how well these compose them.

    Attributes:
        dictionary: ``"words"``, or ``"random"`` for random directions.
        l1: Factor of the sum of the weights.
        l0: Mean number of words per image.
        cosine: Mean cosine of what is composed with the centred image embedding.
        accuracy: Zero-shot accuracy of what is composed; None without classes.
    """

    dictionary: str
    l1: float
    l0: Share
    cosine: Share
    accuracy: Share | None

    def to_dict(self) -> dict[str, Any]:
        """Return the point ready for JSON."""
        found = {"dictionary": self.dictionary, "l1": self.l1}
        shares = {"l0": self.l0.to_dict(), "cosine": self.cosine.to_dict()}
        own = {} if self.accuracy is None else {"accuracy": self.accuracy.to_dict()}
        return {**found, **shares, **own}


@dataclass(frozen=True, eq=False)
class WordEdit:
    """What removing words does to the images that had them.

    Attributes:
        words: Words that were removed.
        images: Places of the images that had one of them.
        embeddings: Unit embeddings of all images without the words, ``[n, d]``.
        before: Zero-shot accuracy on those images of what all words compose; None without classes.
        after: The same without the words.
        others: Zero-shot accuracy on all other images, whose codes stay as they are.

    Examples:
        >>> found = vp.lens.splice(
        ...     model, world.images, ["red", "blue", "a star", "a circle"], progress=False
        ... )
        >>> edit = found.without(["red"])
        >>> edit.words, edit.embeddings.shape
        (('red',), torch.Size([8, 64]))
    """

    words: Sequence[str]
    images: Sequence[int]
    embeddings: Float[Tensor, "n d"]
    before: Share | None
    after: Share | None
    others: Share | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures ready for JSON."""
        named = {"before": self.before, "after": self.after, "others": self.others}
        shares = {name: share.to_dict() for name, share in named.items() if share is not None}
        return {"words": list(self.words), "images": len(self.images), **shares}


@dataclass(frozen=True, eq=False)
class Splice:
    """Images as words.

    Attributes:
        model: Name of the model.
        settings: Penalties and solver.
        words: The vocabulary.
        ids: Ids of the images.
        embeddings: Unit image embeddings, ``[n, d]``.
        image_mean: What was subtracted from them.
        codes: Weights of the words at the chosen penalty, ``[n, v]``.
        curve: A point per penalty, for words and for random directions.
        classes: Names of the classes; none without labels.
        labels: Number of each image's class, -1 for none.
        class_texts: Text embeddings of the classes.
        plain_accuracy: Zero-shot accuracy of the images' own embeddings.
        bad_images: Reason by id for images that could not be read.

    Examples:
        >>> found = vp.lens.splice(
        ...     model, world.images, ["red", "blue", "a star", "a circle"], progress=False
        ... )
        >>> found.compose().shape, len(found.curve)
        (torch.Size([8, 64]), 10)
    """

    model: str
    settings: Any
    words: WordDictionary
    ids: Sequence[str]
    embeddings: Float[Tensor, "n d"]
    image_mean: Float[Tensor, " d"]
    codes: Float[Tensor, "n v"]
    curve: Sequence[SplicePoint]
    classes: Sequence[str]
    labels: Tensor | None
    class_texts: Tensor | None
    plain_accuracy: Share | None
    bad_images: Mapping[str, str]

    def words_of(self, image: int, n: int = SHOWN) -> list[tuple[str, float]]:
        """Return the words of an image with their weights, the heaviest first.

        Raises:
            ValueError: there is no such image.
        """
        if not 0 <= image < len(self.ids):
            raise ValueError(f"there is no image {image}: there are {len(self.ids)}, from 0")
        weights = self.codes[image]
        order = weights.argsort(descending=True)[:n].tolist()
        return [(self.words.words[k], float(weights[k])) for k in order if float(weights[k]) > 0]

    def common_words(self, n: int = SHOWN) -> list[tuple[str, float]]:
        """Return the words with the largest mean weight over all images."""
        mean = self.codes.mean(0)
        order = mean.argsort(descending=True)[:n].tolist()
        return [(self.words.words[k], float(mean[k])) for k in order if float(mean[k]) > 0]

    def compose(self, codes: Float[Tensor, "n v"] | None = None) -> Float[Tensor, "n d"]:
        """Return the unit embeddings that codes compose; by default those of the images."""
        chosen = self.codes if codes is None else codes.double()
        return uncentred_images(chosen @ self.words.centred, self.image_mean)

    def without(self, words: Sequence[str]) -> WordEdit:
        """Remove words from every image's code.

        Raises:
            ValueError: a word is not in the vocabulary, or there is none.
        """
        number = {word: place for place, word in enumerate(self.words.words)}
        missing = [word for word in words if word not in number]
        if missing or not words:
            raise ValueError(
                f"the vocabulary has no {missing[0]!r}: choose among its {len(self.words)} words"
                if missing
                else "name at least one word to remove"
            )
        columns = [number[word] for word in words]
        codes = self.codes.clone()
        had = (codes[:, columns] > 0).any(1)
        codes[:, columns] = 0
        made = self.compose(codes)
        before = after = others = None
        if self.class_texts is not None and self.labels is not None:
            known = self.labels >= 0
            right = self._right(self.compose()), self._right(made)
            if bool((had & known).any()):
                before, after = (share_of(one[had & known]) for one in right)
            if bool((~had & known).any()):
                others = share_of(right[1][~had & known])
        return WordEdit(tuple(words), had.nonzero()[:, 0].tolist(), made, before, after, others)

    def _right(self, embeddings: Tensor) -> Tensor:
        assert self.class_texts is not None
        assert self.labels is not None
        return (embeddings @ self.class_texts.T).argmax(1) == self.labels

    # ------------------------------------------------------------------ tables and files

    def table(self) -> Table:
        """Return the curve for ``rich`` to print."""
        table = Table(title=f"images as words: {self.model}, {len(self.words):,} words")
        table.add_column("dictionary")
        for heading in ("l1", "words per image", "cosine", "zero-shot accuracy"):
            table.add_column(heading, justify="right")
        if self.plain_accuracy is not None:
            table.add_row("the embedding itself", "", "", "", cell(self.plain_accuracy))
        for point in self.curve:
            table.add_row(
                point.dictionary,
                f"{point.l1:g}",
                f"{point.l0.value:.1f} ±{(point.l0.high - point.l0.low) / 2:.1f}",
                cell(point.cosine),
                cell(point.accuracy),
            )
        return table

    def words_table(self, images: int = 8) -> Table:
        """Return the words of the first images for ``rich`` to print."""
        table = Table(title=f"words at l1 {self.settings.chosen:g}")
        table.add_column("image")
        table.add_column("words")
        for place in range(min(images, len(self.ids))):
            words = ", ".join(f"{word} {weight:.2f}" for word, weight in self.words_of(place))
            table.add_row(self.ids[place], words or "none")
        return table

    def plot(self) -> dict[str, Figure]:
        """Return the curve of cosine over L0 as a matplotlib figure, by name."""
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(5.0, 3.4), layout="constrained")
        axes = canvas.add_subplot()
        for name in dict.fromkeys(point.dictionary for point in self.curve):
            points = sorted(
                (point.l0.value, point.cosine.value)
                for point in self.curve
                if point.dictionary == name
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set_xlabel("words per image (L0)")
        axes.set_ylabel("cosine with the embedding")
        axes.set_ylim(0, 1)
        axes.legend()
        return {"curve": canvas}

    def to_dict(self, edits: Sequence[WordEdit] = ()) -> dict[str, Any]:
        """Return the result ready for JSON."""
        names = self.settings.__dataclass_fields__
        settings = {name: getattr(self.settings, name) for name in names}
        plain = {} if self.plain_accuracy is None else {"accuracy": self.plain_accuracy.to_dict()}
        return {
            "schema": "vision_plugin.lens/splice/1",
            "model": self.model,
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
            "n_words": len(self.words),
            "n_images": len(self.ids),
            "bad_images": dict(self.bad_images),
            "embedding": plain,
            "curve": [point.to_dict() for point in self.curve],
            "common_words": [list(pair) for pair in self.common_words(50)],
            "images": [
                {"image": image, "words": [list(pair) for pair in self.words_of(place)]}
                for place, image in enumerate(self.ids[:1000])
            ],
            "edits": [edit.to_dict() for edit in edits],
        }

    def save(self, folder: str | Path, *, edits: Sequence[WordEdit] = ()) -> Path:
        """Write results.json, table.txt and the curve; earlier results of a lens are replaced.

        Raises:
            FileExistsError: something else has the name.
        """
        return save_result(
            folder,
            self.to_dict(edits),
            tables=[self.table(), self.words_table()],
            figures=self.plot(),
        )
