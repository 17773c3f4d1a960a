"""What a vision-language model answers to several questions about the same images.

The tower runs once up to the block whose output is read, the images' tokens once per change of it,
and the questions behind them, all at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
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
        max_new_tokens: Length of an answer in tokens; answers are greedy.

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
        max_new_tokens: int = 1,
    ) -> None:
        self.vlm, self.layer, self.batch_size = vlm, check_reads_one_block(vlm), batch_size
        self.max_new_tokens = max_new_tokens
        end = vlm.native.generation_config.eos_token_id
        self.ends = torch.tensor(end if isinstance(end, list) else [-1 if end is None else end])
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
        """Return the answers, by question.

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
        said = self._written(native, read.past_key_values, n)
        return {
            name: [str(word).strip() for word in self.vlm.processor.batch_decode(
                said[:, place], skip_special_tokens=True)]
            for place, name in enumerate(self.rest)
        }  # fmt: skip

    def _written(self, native: Any, cache: Any, n: int) -> Int[Tensor, "n questions new"]:
        """Return the tokens of greedy answers; what follows an end is the end again.

        The questions stand in one sequence behind what they share. A mask lets each one see that
        and itself, and its positions are those that it has alone.
        """
        device, first = self.prefix.device, len(self.prefix)
        lengths = torch.tensor([len(ids) for ids in self.rest.values()])
        every = torch.arange(len(lengths))
        ids = torch.cat(list(self.rest.values())).expand(n, -1)
        of = every.repeat_interleave(lengths)
        positions = torch.cat([first + torch.arange(length) for length in lengths.tolist()])
        last = lengths.cumsum(0) - 1
        before = torch.full((first,), -1)  # which question a token belongs to; -1 is all of them
        ends = self.ends.to(device)
        said: list[Tensor] = []
        over = torch.zeros(n, len(lengths), dtype=torch.bool, device=device)
        for _ in range(self.max_new_tokens):
            mask = _mask(before, of).to(device)
            output = native(
                input_ids=ids, past_key_values=cache, use_cache=True,
                attention_mask=mask.to(native.dtype).expand(n, 1, -1, -1),
                position_ids=positions.to(device).expand(n, -1), logits_to_keep=last.to(device),
            )  # fmt: skip
            ids = torch.where(over, ends[0], output.logits.argmax(-1))
            said.append(ids)
            over = over | torch.isin(ids, ends)
            if bool(over.all()):
                break
            before, of, positions, last = torch.cat([before, of]), every, positions[last] + 1, every
        return torch.stack(said, dim=2)

    def pull(
        self, name: str, words: Sequence[str], rows: Tensor
    ) -> Float[Tensor, "words n tokens d_model"] | None:
        """Return in which direction of each token an answer of each word becomes more likely.

        It is the gradient of the word's logit less the mean logit of all the words.

        Args:
            name: Name of the question.
            words: Words, each one token of the model's.
            rows: Numbers of the images.

        Returns:
            The gradients; None where a word is more than one token.
        """
        native: Any = self.vlm.original_model
        tokens = _tokens_of(self.vlm.processor, words)
        if tokens is None:
            return None
        ids = torch.cat([self.prefix, self.rest[name]])
        parts: list[Tensor] = []
        with in_eval_mode(self.vlm), self.vlm.vision.alone(), torch.enable_grad():
            for some in rows.split(self.batch_size):
                stream = self.stream[some].clone().requires_grad_()
                with self.vlm.from_stream(stream, self.layer):
                    output = native(
                        input_ids=ids.expand(len(some), -1), pixel_values=self.pixels[some],
                        use_cache=False, logits_to_keep=1,
                    )  # fmt: skip
                logits = output.logits[:, -1].float()
                each = torch.stack([logits[:, found].logsumexp(1) for found in tokens], dim=1)
                raised = (each - each.mean(1, keepdim=True)).sum(0)
                grads = [
                    torch.autograd.grad(one, stream, retain_graph=True)[0].detach()
                    for one in raised
                ]
                parts.append(torch.stack(grads))
        return torch.cat(parts, dim=1)


def _mask(
    before: Int[Tensor, " earlier"], of: Int[Tensor, " new"]
) -> Float[Tensor, "new earlier+new"]:
    """Return what is added to scores of attention: 0, or minus infinity as a number.

    Args:
        before: Which question each earlier token belongs to; -1 stands for all of them.
        of: Which one each new token belongs to.
    """
    every = torch.cat([before, of])
    numbers = torch.arange(len(every))
    mine = (every == of[:, None]) | (every == -1)
    seen = mine & (numbers <= numbers[len(before) :, None])
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def _tokens_of(processor: Any, words: Sequence[str]) -> list[Tensor] | None:
    """Return the tokens that spell each word; None where a word has none."""
    tokenizer = processor.tokenizer
    spelled: dict[str, list[int]] = {word: [] for word in words}
    for index, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        if text.strip() in spelled:
            spelled[text.strip()].append(index)
    if not all(spelled.values()):
        return None
    return [torch.tensor(found) for found in spelled.values()]


def check_reads_one_block(vlm: Any) -> int:
    """Return how many blocks run before the output that a language model reads.

    Args:
        vlm: A VisionLanguageBridge.

    Raises:
        ValueError: it reads the outputs of several blocks, or what comes behind the last.

    Examples:
        >>> vp.tasks.check_reads_one_block(vlm)
        3
    """
    layers = vlm.reach.layers
    if layers is None or len(layers) != 1:
        raise ValueError(
            f"{vlm.cfg.model_name} does not read the output of one block of its tower, and this "
            "task changes that output: use a LLaVA"
        )
    return int(layers[0])
