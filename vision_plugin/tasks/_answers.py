"""What a vision-language model answers in one word to several questions about the same images.

The tower runs once up to the block whose output is read, the images' tokens once per change of it,
and each question for itself behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from vision_plugin.models.site import in_eval_mode


class AnswerPass:
    """Images ready to be asked, with any change of what the language model reads of them.

    Args:
        vlm: A VisionLanguageBridge that reads the output of one block.
        images: The images.
        questions: Questions by name.
        batch_size: Images that run at once.

    Raises:
        ValueError: the model reads several layers, or questions do not follow the images.
    """

    def __init__(
        self,
        vlm: Any,
        images: Sequence[Image],
        questions: Mapping[str, str],
        *,
        batch_size: int = 150,
    ) -> None:
        self.vlm, self.layer, self.batch_size = vlm, check_reads_one_block(vlm), batch_size
        inputs = {name: vlm.prepare([images[0]], text) for name, text in questions.items()}
        ids = {name: each["input_ids"][0] for name, each in inputs.items()}
        shortest = min(len(each) for each in ids.values())
        table = torch.stack([each[:shortest] for each in ids.values()])
        same = (table == table[0]).all(0).long().cumprod(0)
        n_shared = min(int(same.sum()), shortest - 1)
        picture = vlm.native.config.image_token_id
        if any(bool((each[n_shared:] == picture).any()) for each in ids.values()):
            raise ValueError("a question comes before its image: put the image first")
        self.prefix = table[0, :n_shared]
        self.rest = {name: each[n_shared:] for name, each in ids.items()}
        first = next(iter(questions.values()))
        with torch.no_grad(), in_eval_mode(vlm):
            pixels = [
                vlm.prepare(list(images[start : start + batch_size]), first)["pixel_values"]
                for start in range(0, len(images), batch_size)
            ]
            parts = [vlm.vision(batch, stop_at_layer=self.layer) for batch in pixels]
        self.stream: Tensor = torch.cat(parts)
        self.pixels: Tensor = torch.cat(pixels)

    def __len__(self) -> int:
        return len(self.stream)

    @torch.no_grad()
    def answers(
        self,
        stream: Float[Tensor, "n tokens d_model"] | None = None,
        rows: Tensor | None = None,
    ) -> dict[str, list[str]]:
        """Return the first word of each answer, by question.

        Args:
            stream: What the language model reads in place of the images' own, for these rows.
            rows: Numbers of the images; None asks about all.
        """
        rows = torch.arange(len(self)) if rows is None else rows
        stream = self.stream[rows] if stream is None else stream
        found: dict[str, list[str]] = {name: [] for name in self.rest}
        with in_eval_mode(self.vlm), self.vlm.vision.alone():
            for place in range(0, len(rows), self.batch_size):
                some = slice(place, place + self.batch_size)
                for name, words in self._asked(stream[some], self.pixels[rows[some]]).items():
                    found[name] += words
        return found

    def _asked(self, stream: Tensor, pixels: Tensor) -> dict[str, list[str]]:
        native: Any = self.vlm.original_model
        n = len(stream)
        with self.vlm.from_stream(stream, self.layer):
            read = native(
                input_ids=self.prefix.expand(n, -1), pixel_values=pixels, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        found = {}
        for name, ids in self.rest.items():
            output = native(
                input_ids=ids.expand(n, -1), past_key_values=copy.deepcopy(read.past_key_values),
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            chosen = output.logits[:, -1].argmax(-1, keepdim=True)
            words = self.vlm.processor.batch_decode(chosen, skip_special_tokens=True)
            found[name] = [str(word).strip() for word in words]
        return found


def check_reads_one_block(vlm: Any) -> int:
    """Return how many blocks run before the output that a language model reads.

    Raises:
        ValueError: it reads the outputs of several blocks, or what comes behind the last.
    """
    layers = vlm.reach.layers
    if layers is None or len(layers) != 1:
        raise ValueError(
            f"{vlm.cfg.model_name} does not read the output of one block of its tower, and this "
            "task changes that output: use a LLaVA"
        )
    return int(layers[0])
