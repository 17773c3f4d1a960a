"""A vocabulary embedded by a model's text tower, centred as SpLiCE centres it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vision_plugin._inputs import sentences
from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_regular
from vision_plugin.models.site import same_signature, signature

MAX_WORDS_BYTES = 64 * 2**20
MAX_WORDS = 200_000


@dataclass(frozen=True, eq=False)
class WordDictionary:
    """Words with their embeddings in a model's joint space.

    Attributes:
        words: The words.
        embeddings: Unit text embeddings ``[v, d]``.
        model: Name of the model that embedded them.
        signature: Signature of that model's vision tower, to tell models apart.

    Examples:
        >>> words = vp.lens.WordDictionary.of(model, ["red", "blue"], template="a {} object")
        >>> words.embeddings.shape, words.model
        (torch.Size([2, 64]), 'demo')
    """

    words: Sequence[str]
    embeddings: Float[Tensor, "v d"]
    model: str
    signature: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.words) == 0:
            raise ValueError("the vocabulary is empty: give at least one word")
        if len(self.words) != len(self.embeddings):
            raise ValueError(
                f"{len(self.words)} words have {len(self.embeddings)} embeddings: give one each"
            )

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, model: Any, words: Sequence[str] | str | Path, *, template: str = "{}") -> Any:
        """Embed words with a model's text tower.

        Args:
            model: A VisionBridge with a text tower.
            words: The words, or a text file with one a line; repeats count once.
            template: Sentence around a word.

        Raises:
            ValueError: there is no word, there are too many, or the model has no text tower.
        """
        every = _read(words) if isinstance(words, (str, Path)) else list(words)
        cleaned = [" ".join(str(word).split()) for word in every]
        chosen = list(dict.fromkeys(word for word in cleaned if word))
        if not chosen:
            raise ValueError(
                "the vocabulary is empty: give at least one word, one a line in a file"
            )
        if len(chosen) > MAX_WORDS:
            raise ValueError(f"the vocabulary has {len(chosen):,} words: at most {MAX_WORDS:,}")
        require_text(model)
        texts = model.encode_text(sentences(template, chosen, argument="template"))
        return cls(chosen, texts.float().cpu(), str(model.cfg.model_name), signature(model))

    def check_model(self, model: Any) -> None:
        """Raise ValueError unless the words were embedded by this model."""
        require_text(model)
        if not same_signature(self.signature, signature(model)):
            raise ValueError(
                f"the vocabulary was embedded by {self.model}, and {model.cfg.model_name} has "
                "another text space: embed the words again with WordDictionary.of(model, words)"
            )

    @property
    def centred(self) -> Float[Tensor, "v d"]:
        """Unit embeddings minus their mean, again of unit norm; a zero row stays zero.

        One word alone has nothing to be centred by and stays as it is.
        """
        unit = nn.functional.normalize(self.embeddings.double(), dim=1)
        return unit if len(unit) == 1 else nn.functional.normalize(unit - unit.mean(0), dim=1)


def require_text(model: Any) -> None:
    """Raise ValueError unless a model compares images with texts."""
    if model.tokenizer is None or not model.adapter.has_joint_space:
        raise ValueError(
            f"{model.cfg.model_name} has no text tower, and words need one: use a CLIP or a SigLIP"
        )


def centred_images(
    embeddings: Float[Tensor, "n d"], mean: Float[Tensor, " d"]
) -> Float[Tensor, "n d"]:
    """Return unit embeddings minus the mean of images, again of unit norm."""
    unit = nn.functional.normalize(embeddings.double(), dim=1)
    return nn.functional.normalize(unit - mean.double(), dim=1)


def uncentred_images(
    centred: Float[Tensor, "n d"], mean: Float[Tensor, " d"]
) -> Float[Tensor, "n d"]:
    """Return image embeddings of what a code composes: unit, with the mean of images put back."""
    unit = nn.functional.normalize(centred.double(), dim=1)
    return nn.functional.normalize(unit + mean.double(), dim=1)


def _read(path: str | Path) -> list[str]:
    place = local_path(path)
    if not place.is_file():
        raise FileNotFoundError(
            f"vocabulary={str(path)!r}: there is no such file; give one word a line"
        )
    try:
        return read_regular(place, MAX_WORDS_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not text in UTF-8 ({error}): convert it") from error
