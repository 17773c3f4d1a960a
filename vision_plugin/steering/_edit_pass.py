"""Images that run once up to where an edit begins, and from there once per edit."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.models.site import (
    Site,
    class_token_alone,
    in_eval_mode,
    reads_class_token,
)
from vision_plugin.steering._attach import Worker, require_source, running
from vision_plugin.steering._basis import Latents
from vision_plugin.steering._cached_pass import CachedPass, check_images
from vision_plugin.steering._change import Change
from vision_plugin.steering._edit import Edit
from vision_plugin.steering._editor import LatentEditor, Reading

KEPT_ELEMENTS = 2**26
"""Most latents of a dictionary that are kept between edits (256 MiB in float32)."""


class EditPass:
    """Images ready to be embedded with any edit.

    The residual stream before the first edited block is computed once for each block that an edit
    begins at. The last block runs for the class token alone where the embedding reads nothing else
    and no edit is made there. With hooks of a user's on the model, every pass begins at the pixels.

    The latents of the last dictionary that was edited are kept, too: its weights stay as they are.

    Args:
        model: A VisionBridge.
        pixels: Images prepared by ``model.preprocess``.
        batch_size: Images that run at once.

    Raises:
        ValueError: the images are not a batch of finite pixels.

    Examples:
        >>> ready = vp.steering.EditPass(model, pixels)
        >>> ready.embed(vp.Edit.clamp(sae, {12: 50.0})).shape
        torch.Size([8, 64])
    """

    def __init__(
        self,
        model: Any,
        pixels: Float[Tensor, "n channels height width"],
        *,
        batch_size: int = 64,
    ) -> None:
        check_images(pixels)
        self.model, self.batch_size = model, batch_size
        self.pixels = pixels.to(device=model.device, dtype=model.dtype)
        self._streams: dict[int, Tensor] = {}
        self._editors: dict[int, LatentEditor] = {}
        self._checked = set[int]()
        self._reads_class_token: bool | None = None
        self._slopes: dict[tuple[str, str], Tensor] = {}
        self._key: object = None
        self._readings: dict[int, Reading] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def stream(self, block: int) -> Float[Tensor, "n tokens d_model"]:
        """Return the residual stream that enters a block; the number of blocks gives the last."""
        if block not in self._streams:
            with torch.no_grad(), in_eval_mode(self.model):
                parts = [
                    self.model(batch, stop_at_layer=block)
                    for batch in self.pixels.split(self.batch_size)
                ]
            self._streams[block] = torch.cat(parts)
        return self._streams[block]

    def activations(self, hook_name: str) -> Float[Tensor, "n tokens *d"]:
        """Return what a hook gives for the images as they are."""
        for block in range(int(self.model.cfg.n_layers)):
            names = (f"blocks.{block}.hook_resid_pre", f"blocks.{block}.hook_resid_post")
            for after, name in enumerate(names):
                if self.model.hook_dict[name] is self.model.hook_dict.get(hook_name):
                    return self.stream(block + after)
        parts = []
        with torch.no_grad(), in_eval_mode(self.model):
            for batch in self.pixels.split(self.batch_size):
                _, found = self.model.run_with_cache(
                    batch, names_filter=hook_name, return_cache_object=False
                )
                parts.append(found[hook_name])
        return torch.cat(parts)

    def slopes(
        self, site: Site, lead: Callable[[Tensor, slice], Tensor], name: str
    ) -> Float[Tensor, "n tokens *d"]:
        """Return the gradient of a number per image, at the hook that a site writes.

        Args:
            site: The site.
            lead: Returns the numbers ``[b]`` from unit embeddings ``[b, d_embed]`` of the images in
                a slice.
            name: What the number is: a gradient is computed once for each name and hook.
        """
        key = name, site.hook_name_out
        if key not in self._slopes:
            begin = CachedPass(site)
            entry = self.pixels if begin.start is None else self.stream(begin.start)
            parts, at = [], 0
            with torch.enable_grad(), in_eval_mode(self.model), self._last_block([begin]):
                for batch in entry.split(self.batch_size):
                    some = slice(at, at + len(batch))
                    parts.append(begin.slope(batch, partial(_of_slice, lead, some)))
                    at += len(batch)
            self._slopes[key] = torch.cat(parts)
        return self._slopes[key]

    def rerun(self, site: Site, edited: Tensor, rows: Tensor) -> Float[Tensor, "m d_embed"]:
        """Return unit embeddings of some images with another activation; gradients flow through it.

        Args:
            site: The site whose written hook gives the activation.
            edited: The activation in its place, ``[m, tokens, ...]``.
            rows: Numbers of the images, ``[m]``.
        """
        begin = CachedPass(site)
        entry = self.pixels if begin.start is None else self.stream(begin.start)
        with in_eval_mode(self.model), self._last_block([begin]):
            return begin.features(entry[rows], edited)

    def _last_block(self, begins: list[CachedPass]) -> AbstractContextManager[None]:
        """Return a context in which the last block runs for the class token alone, if it may."""
        if not begins or not all(
            begin.start is not None and begin.ends_before_last for begin in begins
        ):
            return nullcontext()
        if self._reads_class_token is None:
            last = self.stream(int(self.model.cfg.n_layers) - 1)[:2]
            self._reads_class_token = reads_class_token(self.model, last)
        return class_token_alone(self.model) if self._reads_class_token else nullcontext()

    def _reading(self, worker: Worker, place: int, batch: Tensor) -> Reading | None:
        """Return the latents that a change reads of a batch, those of the last dictionary kept."""
        change = worker.change
        if not isinstance(change.basis, Latents) or torch.is_grad_enabled():
            return None
        key = (change.basis.dictionary, change.tokens, change.patches)
        if self._key != key:
            self._key, self._readings = key, {}
        if place in self._readings:
            return self._readings[place]
        reading = worker.read(batch)
        kept = sum(one.n_elements for one in self._readings.values())
        if reading is not None and kept + reading.n_elements <= KEPT_ELEMENTS:
            self._readings[place] = reading
        return reading

    def _worker(self, change: Change, *, check_model: bool) -> Worker:
        """Return what makes a change; an SAE is checked and examined once for all edits."""
        basis = change.basis
        if not isinstance(basis, Latents):
            return Worker(self.model, change, check_model=check_model)
        key = id(basis.dictionary)
        worker = Worker(
            self.model,
            change,
            check_model=check_model and key not in self._checked,
            editor=self._editors.get(key),
        )
        self._editors[key] = worker.editor
        if check_model:
            self._checked.add(key)
        return worker

    def embed(
        self,
        edit: Edit | None = None,
        *,
        source: EditPass | None = None,
        check_model: bool = True,
    ) -> Float[Tensor, "n d_embed"]:
        """Return image embeddings under an edit, not normalised.

        A model without a space shared with text gives its pooled output.

        Args:
            edit: What changes; None changes nothing.
            source: The images whose values a swap takes, one for each image.
            check_model: Refuse an SAE that was trained on another model.

        Raises:
            ValueError: the edit does not fit the model.
        """
        return torch.cat(list(self.embeddings(edit, source=source, check_model=check_model)))

    def embeddings(
        self,
        edit: Edit | None = None,
        *,
        source: EditPass | None = None,
        check_model: bool = True,
    ) -> Generator[Float[Tensor, "b d_embed"], None, None]:
        """Yield what :meth:`embed` returns, batch by batch.

        The edit stays on the model until the generator is exhausted or closed.
        """
        edit = edit or Edit()
        with torch.no_grad():
            workers = [self._worker(change, check_model=check_model) for change in edit.changes]
        begins = [CachedPass(worker.site) for worker in workers]
        starts = [begin.start for begin in begins if begin.start is not None]
        start = min(starts) if starts and len(starts) == len(begins) else None
        # The stream that enters the first edited block is edited here: no hook fires before it.
        here = [b.is_stream and b.start == start for b in begins]
        first = [worker for worker, is_here in zip(workers, here, strict=True) if is_here]
        rest = [worker for worker, is_here in zip(workers, here, strict=True) if not is_here]
        # One block's exit and the next one's entry are one stream at two hooks, in this order.
        entering = self.model.hook_dict.get(f"blocks.{start}.hook_resid_pre")
        first.sort(key=lambda one: self.model.hook_dict[one.site.hook_name_out] is entering)
        entry = self.pixels if start is None else self.stream(start)
        kwargs = {} if start is None else {"start_at_layer": start}
        if start is None:
            first, rest = [], workers
        last = self._last_block(begins)
        donors = self._donors(workers, source)
        with in_eval_mode(self.model), last, running(self.model, rest):
            for place, batch in enumerate(entry.split(self.batch_size)):
                for worker, donor in donors:
                    worker.donor = donor[place]
                with torch.no_grad():
                    for number, worker in enumerate(first):
                        if number == 0:  # the stream is as it was
                            worker.reading = self._reading(worker, place, batch)
                        batch = worker(batch, batch)
                    found = self.model.image_features(batch, normalize=False, **kwargs)
                yield found

    def _donors(
        self, workers: list[Worker], source: EditPass | None
    ) -> list[tuple[Worker, tuple[Tensor, ...]]]:
        """Return the other images' activations for each swap, in batches."""
        swaps = [worker for worker in workers if worker.change.operation == "swap"]
        if not swaps:
            return []
        others = require_source(source)
        if len(others) != len(self):
            raise ValueError(f"source= has {len(others)} images for {len(self)}: give one for each")
        return [
            (worker, others.activations(worker.site.hook_name).split(self.batch_size))
            for worker in swaps
        ]


def _of_slice(lead: Callable[[Tensor, slice], Tensor], some: slice, embeddings: Tensor) -> Tensor:
    return lead(embeddings, some)
