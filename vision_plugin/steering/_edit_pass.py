"""Images that run once up to where an edit begins, and from there once per edit."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.models.site import in_eval_mode
from vision_plugin.steering._attach import Worker, running
from vision_plugin.steering._basis import Latents
from vision_plugin.steering._cached_pass import CachedPass, check_images
from vision_plugin.steering._change import Change
from vision_plugin.steering._edit import Edit
from vision_plugin.steering._editor import LatentEditor


class EditPass:
    """Images ready to be embedded with any edit.

    The residual stream before the first edited block is computed once for each block that an edit
    begins at. With hooks of a user's on the model, every pass begins at the pixels.

    Args:
        model: A VisionBridge.
        pixels: Images prepared by ``model.preprocess``.
        batch_size: Images that run at once.

    Raises:
        ValueError: the images are not a batch of finite pixels.
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

    @torch.no_grad()
    def embed(
        self, edit: Edit | None = None, *, check_model: bool = True
    ) -> Float[Tensor, "n d_embed"]:
        """Return image embeddings under an edit, not normalised.

        A model without a space shared with text gives its pooled output.

        Args:
            edit: What changes; None changes nothing.
            check_model: Refuse an SAE that was trained on another model.

        Raises:
            ValueError: the edit does not fit the model.
        """
        edit = edit or Edit()
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
        parts = []
        with in_eval_mode(self.model), running(self.model, rest):
            for batch in entry.split(self.batch_size):
                for worker in first:
                    batch = worker(batch, batch)
                parts.append(self.model.image_features(batch, normalize=False, **kwargs))
        return torch.cat(parts)
