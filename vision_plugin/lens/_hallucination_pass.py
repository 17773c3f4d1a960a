"""What a vision-language model answers to questions about objects, as it is and under edits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vision_plugin.lens._hallucination_data import ObjectQuestions
from vision_plugin.lens._language_edit import edit_language
from vision_plugin.lens._language_reading import LanguageReading
from vision_plugin.models.site import in_eval_mode
from vision_plugin.steering import Edit

EditOf = Callable[[int], Edit]
"""Returns the edit of the language model for an object's number."""


def _nothing(number: int) -> Edit:
    del number
    return Edit()


class QuestionPass:
    """Questions ready to be asked under any edits.

    Args:
        vlm: A VisionLanguageBridge.
        data: The questions.
        batch_size: Questions per pass.

    Raises:
        ValueError: a word of the answers or an object is not in the vocabulary.
    """

    def __init__(self, vlm: Any, data: ObjectQuestions, *, batch_size: int = 64) -> None:
        self.vlm, self.data, self.batch_size = vlm, data, batch_size
        self.reading = LanguageReading(vlm)
        self.yes, self.no = (self.reading.tokens_of(word)[0] for word in data.answers)
        self.tokens = [self.reading.tokens_of(name) for name in data.objects]
        self._inputs: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
        self._streams: dict[tuple[int, ...], Tensor] = {}
        layers = vlm.reach.layers
        self._layer = layers[0] if layers is not None and len(set(layers)) == 1 else None

    def margins(
        self,
        language: EditOf = _nothing,
        tower: Edit | None = None,
        where: Bool[Tensor, " q"] | None = None,
    ) -> Float[Tensor, " q"]:
        """Return the logit of yes minus that of no for each question.

        Args:
            language: Edit of the language model for each object.
            tower: Edit of the tower.
            where: Questions that are asked; the others get NaN. None asks all.
        """
        found = torch.full((len(self.data),), torch.nan, dtype=torch.float64)
        for number, rows in self._by_object(where):
            text = self.data.question.format(self.data.objects[number])
            logits = self._last(rows, text, language(number), tower)
            found[rows] = (logits[:, self.yes] - logits[:, self.no]).double()
        return found

    def other_answers(
        self,
        language: EditOf = _nothing,
        tower: Edit | None = None,
        where: Bool[Tensor, " q"] | None = None,
    ) -> dict[str, Tensor]:
        """Return the first token of the answer to each other question, per question of the data."""
        found = {name: torch.full((len(self.data),), -1) for name in self.data.others}
        for number, rows in self._by_object(where):
            for name, text in self.data.others.items():
                logits = self._last(rows, text, language(number), tower)
                found[name][rows] = logits.argmax(1)
        return found

    def _by_object(self, where: Tensor | None) -> list[tuple[int, Tensor]]:
        chosen = torch.ones(len(self.data), dtype=torch.bool) if where is None else where
        found = []
        for number in range(len(self.data.objects)):
            rows = ((self.data.asked == number) & chosen).nonzero()[:, 0]
            if len(rows):
                found.append((number, rows))
        return found

    @torch.no_grad()
    def _last(self, rows: Tensor, text: str, edit: Edit, tower: Edit | None) -> Tensor:
        """Return the logits behind a prompt about the images of some questions."""
        parts = []
        for some in rows.split(self.batch_size):
            with in_eval_mode(self.vlm), ExitStack() as stack:
                inputs = self._prepared(tuple(self.data.image[some].tolist()), text)
                if tower is not None and len(tower):
                    stack.enter_context(self.vlm.edit(tower))
                elif self._layer is not None:  # the tower ran before
                    stream = self._stream(tuple(self.data.image[some].tolist()), inputs)
                    stack.enter_context(self.vlm.from_stream(stream, self._layer))
                if len(edit):
                    stack.enter_context(edit_language(self.vlm, edit, inputs))
                parts.append(self.vlm.forward(inputs)[:, -1].float().cpu())
        return torch.cat(parts)

    def _prepared(self, images: tuple[int, ...], text: str) -> dict[str, Any]:
        """Return the inputs of some images with a prompt; each is prepared once."""
        key = text, images
        if key not in self._inputs:
            self._inputs[key] = self.vlm.prepare([self.data.images[i] for i in images], text)
        return dict(self._inputs[key])

    def _stream(self, images: tuple[int, ...], inputs: dict[str, Any]) -> Tensor:
        """Return what the language model reads of the tower, which runs once for some images."""
        if images not in self._streams:
            pixels = inputs["pixel_values"]
            self._streams[images] = self.vlm.vision(pixels, stop_at_layer=self._layer)
        return self._streams[images]

    # ------------------------------------------------------------------ internal vocabulary

    @torch.no_grad()
    def confidence_maps(self) -> Float[Tensor, "images objects positions"]:
        """Return each object's largest probability over layers, at each of the image's tokens."""
        parts = []
        prompt = self.data.question.format(self.data.objects[0])
        for cache, rows, _ in self.reading.read(
            self.data.images, prompt, batch_size=self.batch_size
        ):
            best: Tensor | None = None
            for hook in self.reading.hooks:
                hidden = self.reading.at_images(cache[hook], rows)
                shares = torch.softmax(self.reading.logits(hidden).float(), dim=-1)
                own = torch.stack([shares[..., ids].amax(-1) for ids in self.tokens], dim=1)
                best = own if best is None else torch.maximum(best, own)
            assert best is not None
            parts.append(best.cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def mean_states(self) -> Float[Tensor, "images layers d_model"]:
        """Return the mean hidden state of each image's tokens at every layer."""
        parts = []
        prompt = self.data.question.format(self.data.objects[0])
        for cache, rows, _ in self.reading.read(
            self.data.images, prompt, batch_size=self.batch_size
        ):
            layers = [self.reading.at_images(cache[h], rows).mean(1) for h in self.reading.hooks]
            parts.append(torch.stack(layers, dim=1).float().cpu())
        return torch.cat(parts)

    def object_masks(self, n_positions: int) -> Bool[Tensor, "images positions"] | None:
        """Return the image tokens at least half of which the object covers."""
        if self.data.masks is None:
            return None
        masks = self.data.masks.float()[:, None]
        covered = nn.functional.adaptive_avg_pool2d(masks, self.reading.grid(n_positions))
        return covered.flatten(1) >= 0.5
