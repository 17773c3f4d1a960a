"""Words to name features with: the list that ships with the package, or any text file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._inputs import sentences
from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_regular

PACKAGED = Path(__file__).parent / "vocabulary.txt"
"""Words for things that can be seen; the header of the file says where they come from."""
MAX_BYTES = 16 * 2**20
MAX_WORDS = 500_000
MAX_LENGTH = 300
_MOST_RAW = 10_000
"""Longest text that is cleaned before it is refused."""
"""Characters of a name."""
_PROBES = 8
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Vocabulary:
    """Distinct words or short texts, in order.

    Attributes:
        words: The words.
        name: Where they come from, for records.

    Examples:
        >>> vocabulary = vp.lens.Vocabulary(("red", "blue"), name="mine")
        >>> vocabulary.embed(model, "a {} object").shape
        torch.Size([2, 64])
    """

    words: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.words)

    @property
    def sha256(self) -> str:
        """SHA-256 of the words, one a line."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def embed(
        self, judge: Any, template: str, given: Float[Tensor, "given d_given"] | None = None
    ) -> Float[Tensor, "words d_embed"]:
        """Return unit embeddings of a sentence about each word.

        Args:
            judge: A VisionBridge that reads text.
            template: Sentence with one ``{}``, the place of the word.
            given: Embeddings that were made before; some of them are made again and compared.

        Raises:
            ValueError: the template has no place for a word, or ``given`` is of another text space
                or other words.
        """
        if given is None:
            found: Tensor = judge.encode_text(
                sentences(template, self.words, argument="template"), normalize=True
            )
            return found.float().cpu()
        places = torch.linspace(0, len(self) - 1, min(_PROBES, len(self))).long().tolist()
        probes = sentences(template, [self.words[i] for i in places], argument="template")
        again = judge.encode_text(probes).float().cpu()
        if given.shape != (len(self), again.shape[1]):
            raise ValueError(
                f"text_embeddings= are {list(given.shape)}, and {judge.cfg.model_name} embeds the "
                f"{len(self):,} words as {[len(self), again.shape[1]]}: they are of another "
                "model's text space or of other words, so leave them out"
            )
        unit = torch.nn.functional.normalize(given.float().cpu(), dim=-1)
        if not bool(((unit[places] * again).sum(-1) >= 1 - _TOLERANCE).all()):
            raise ValueError(
                f"text_embeddings= are not what {judge.cfg.model_name} makes of these words with "
                f"template={template!r}: they are of another model's text space or of other "
                "words, so leave them out"
            )
        return unit


def read_vocabulary(source: str | Path | Sequence[str] | Vocabulary | None = None) -> Vocabulary:
    """Return a vocabulary.

    Args:
        source: A text file in UTF-8, a word or short text a line, where a line that begins with
            ``#`` is a remark; or the words themselves; None takes the list that ships with the
            package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, has no words, or too many or too long ones.

    Examples:
        >>> vp.lens.read_vocabulary(["red", "blue", "red"]).words
        ('red', 'blue')
    """
    if isinstance(source, Vocabulary):
        return source
    if source is not None and not isinstance(source, (str, Path)):
        return _vocabulary(source, "given words")
    path = PACKAGED if source is None else local_path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"vocabulary={str(source)!r}: there is no such file; write a word a line into one"
        )
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): convert it") from error
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    name = "vision_plugin" if source is None else str(source)
    return _vocabulary(lines, name, path)


def _vocabulary(words: Any, name: str, where: Path | None = None) -> Vocabulary:
    shown = where or "vocabulary="
    texts = list(dict.fromkeys(map(str, words)))
    if len(texts) > MAX_WORDS:
        raise ValueError(f"{shown} has {len(texts):,} words, above the limit of {MAX_WORDS:,}")
    longest = max(texts, key=len, default="")
    if len(longest) > _MOST_RAW:  # before each character is looked at
        raise ValueError(_too_long(shown, longest))
    found = tuple(dict.fromkeys(word for word in map(clean_name, texts) if word))
    if not found:
        raise ValueError(f"{shown} has no words: write at least one, a word a line")
    if len(found) > MAX_WORDS:
        raise ValueError(f"{shown} has {len(found):,} words, above the limit of {MAX_WORDS:,}")
    longest = max(found, key=len)
    if len(longest) > MAX_LENGTH:
        raise ValueError(_too_long(shown, longest))
    return Vocabulary(found, name)


def _too_long(shown: object, text: str) -> str:
    return (
        f"{shown} has a text of {len(text):,} characters, {text[:30]!r}..., above the limit of "
        f"{MAX_LENGTH}: write a word or a short text a line"
    )


def clean_name(text: str) -> str:
    """Return text as one line, without what a terminal would not print."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())
