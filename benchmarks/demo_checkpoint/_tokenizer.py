"""A tokenizer of CLIP's kind (lower-case byte-level BPE) for the demo world's texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"


def build_tokenizer(texts: Iterable[str], *, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer that knows each word of the given texts as one token.

    Any other text is spelled out in smaller pieces, down to bytes, so nothing is unknown.

    Args:
        texts: texts in lower case.
        max_length: the text tower's context, in tokens.
    """
    from transformers import CLIPTokenizer

    words = sorted({word for text in texts for word in text.split()})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    last_letters = [letter + SUFFIX for letter in alphabet]
    learner = Tokenizer(BPE(end_of_word_suffix=SUFFIX))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        end_of_word_suffix=SUFFIX,
        # The learner numbers last letters as it meets them, in the order of a hash table that
        # differs each time, and breaks ties by number; as special tokens they are numbered first.
        special_tokens=last_letters,
        show_progress=False,
    )
    learner.train_from_iterator(words, trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = [*alphabet, *last_letters, *(piece for piece, _ in learned)]
    vocabulary = {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=_merges(learner), model_max_length=max_length)


def _merges(learner: Tokenizer) -> list[Any]:
    # Pairs, as BPE takes them; the tokenizer class says list[str].
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
