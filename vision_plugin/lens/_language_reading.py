"""A language model read through its own final norm and unembedding, at its image tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from vision_plugin.models.site import in_eval_mode


class LanguageReading:
    """Hidden states of a language model in the space of its vocabulary.

    Args:
        vlm: A VisionLanguageBridge.
    """

    def __init__(self, vlm: Any) -> None:
        self.vlm = vlm
        self.n_layers = int(vlm.language.cfg.n_layers)
        blocks = [f"blocks.{i}.hook_resid_post" for i in range(self.n_layers)]
        self.hooks = ["blocks.0.hook_resid_pre", *blocks]
        vlm.check_hook_names(self.hooks)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer.

        Raises:
            ValueError: the model was wrapped without its processor.
        """
        if self.vlm.processor is None:
            raise ValueError(
                f"{self.vlm.cfg.model_name} was wrapped without its processor, so its words cannot "
                "be spelled: use wrap_vlm(module, processor=...)"
            )
        return self.vlm.processor.tokenizer

    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Return the logits of hidden states: the final norm, then the unembedding."""
        norm = self.vlm.language.ln_final.original_component
        unembed = self.vlm.language.unembed.original_component
        found: Tensor = unembed(norm(hidden))
        return found

    def image_rows(self, input_ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch positions"]:
        """Return the places of the image's tokens in each prompt.

        Raises:
            ValueError: the prompts have different numbers of them.
        """
        config = self.vlm.native.config
        token = getattr(config, "image_token_id", None)
        token = config.image_token_index if token is None else token
        found = torch.eq(input_ids, int(token))
        counts = found.sum(1)
        if int(counts.min()) == 0 or int(counts.min()) != int(counts.max()):
            raise ValueError(
                f"the prompts of {self.vlm.cfg.model_name} have {int(counts.min())} to "
                f"{int(counts.max())} image tokens: give one image of one size per prompt"
            )
        rows: Tensor = found.nonzero()[:, 1].view(len(input_ids), -1)
        return rows

    @torch.no_grad()
    def read(
        self,
        images: Sequence[Image],
        prompt: str | Sequence[str],
        *,
        batch_size: int = 32,
        hooks: Sequence[str] | None = None,
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Yield hidden states by hook, the image's rows and the logits, batch by batch.

        Args:
            images: The images.
            prompt: One prompt for all, or one for each.
            batch_size: Images per pass.
            hooks: Hooks to read; None reads every layer.
        """
        names = list(self.hooks if hooks is None else hooks)
        for start in range(0, len(images), batch_size):
            some = slice(start, start + batch_size)
            asked = prompt if isinstance(prompt, str) else list(prompt[some])
            with in_eval_mode(self.vlm):
                inputs = self.vlm.prepare(list(images[some]), asked)
                rows = self.image_rows(inputs["input_ids"])
                logits, cache = self.vlm.run_with_cache(
                    inputs, names_filter=names, return_cache_object=False
                )
            yield cache, rows, logits

    def at_images(self, hidden: Tensor, rows: Tensor) -> Float[Tensor, "batch positions d_model"]:
        """Return the hidden states of the image's tokens."""
        return hidden.gather(1, rows.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))

    def grid(self, n_positions: int) -> tuple[int, int]:
        """Return rows and columns of the image's tokens: the tower's grid, or a square, or a line.

        A projector may merge patches, and then the tokens have a smaller grid.
        """
        rows, columns = self.vlm.vision.token_layout().grid
        if rows * columns == n_positions:
            return int(rows), int(columns)
        side = round(n_positions**0.5)
        return (side, side) if side * side == n_positions else (1, n_positions)

    def tokens_of(self, word: str) -> list[int]:
        """Return the ids of a word's tokens.

        A vocabulary may have a word with the space before it: the spelling with fewer tokens
        counts.

        Raises:
            ValueError: the vocabulary does not have the word.
        """
        tokenizer = self.tokenizer
        unknown = tokenizer.unk_token_id
        found = []
        for text in (word, f" {word}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [int(i) for i in ids if tokenizer.decode([int(i)]).strip()]
            if ids and unknown not in ids:
                found.append(ids)
        if not found:
            raise ValueError(
                f"{self.vlm.cfg.model_name} has no token for {word!r}: choose words of its "
                "vocabulary"
            )
        return min(found, key=len)

    def spelled(self, token: int) -> str:
        """Return a token as text, with blanks made visible."""
        text = self.tokenizer.convert_ids_to_tokens(token)
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        return text.replace("\u2581", " ").replace("\u0120", " ").strip() or repr(text)

    def confidence(
        self, hidden: Float[Tensor, "*batch d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "*batch"]:
        """Return the largest probability among a word's tokens at each hidden state.

        This is the internal confidence of Jiang et al. 2024 (arXiv 2410.02762) before its maximum
        over layers and positions.
        """
        return torch.softmax(self.logits(hidden).float(), dim=-1)[..., list(tokens)].amax(-1)
