"""Forward passes that run the model below a site once per image, the rest once per edit.

An edited pass begins at the latest place from which the edit can still be made: at the block that
the edited residual stream enters, at the first block that holds one of the dictionary's hooks, or
at the pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vision_plugin.models.site import Site, hooked, in_eval_mode


@dataclass(frozen=True)
class Prepared:
    """Activations of some images from one run without an edit.

    Attributes:
        entry: input of an edited pass: the residual stream ``[n, tokens, d_model]``, or pixels.
        source: activation at the hook that the dictionary encodes, ``[n, ..., d]``.
        target: activation at the hook that is edited.
        final: the residual stream behind the last block; None unless it is asked for.
        embedding: image embeddings without an edit, not normalised, ``[n, d_embed]``.

    Examples:
        >>> site = vp.steering.Latents(sae).site(model, "all")
        >>> prepared = vp.steering.CachedPass(site).prepare(pixels)
        >>> prepared.source.shape, prepared.entry.shape
        (torch.Size([8, 65, 128]), torch.Size([8, 65, 128]))
    """

    entry: Tensor
    source: Tensor
    target: Tensor
    final: Tensor | None
    embedding: Tensor

    def __len__(self) -> int:
        return self.entry.shape[0]


@dataclass(frozen=True)
class CachedPass:
    """A forward pass in two parts, with a dictionary's site between them.

    Examples:
        >>> site = vp.steering.Latents(sae).site(model, "all")
        >>> cached = vp.steering.CachedPass(site)
        >>> cached.start, cached.prepare(pixels).embedding.shape
        (3, torch.Size([8, 64]))
    """

    site: Site

    @property
    def model(self) -> Any:
        """Return the VisionBridge."""
        return self.site.model

    @cached_property
    def _begin(self) -> tuple[int | None, bool]:
        """Return the first block to run, and whether the edit replaces the stream entering it."""
        hooks, site = self.model.hook_dict, self.site
        if any(hook.fwd_hooks for hook in hooks.values()):
            # A user's hooks and spliced SAEs are part of the model: all of it runs every time.
            return None, False
        if site.hook_name == site.hook_name_out:
            target = hooks[site.hook_name_out]
            for block in range(self.n_layers):
                if target is hooks[f"blocks.{block}.hook_resid_pre"]:
                    return block, True
                if target is hooks[f"blocks.{block}.hook_resid_post"]:
                    return block + 1, True
        starts = [self._block_of(name) for name in (site.hook_name, site.hook_name_out)]
        known = [start for start in starts if start is not None]
        return (min(known) if len(known) == 2 else None), False

    @property
    def start(self) -> int | None:
        """Return the block at which an edited pass begins; the number of blocks for the head alone,
        None for the pixels."""
        return self._begin[0]

    @property
    def is_stream(self) -> bool:
        """Return whether the edited activation is the residual stream entering block ``start``."""
        return self._begin[1]

    @property
    def ends_before_last(self) -> bool:
        """Return whether the edit is made before the last block, so that only the stream that
        enters it shows the edit."""
        if self.is_stream:
            return self.start is not None and self.start < self.n_layers
        block = self._block_of(self.site.hook_name_out)
        return block is not None and block < self.n_layers - 1

    @property
    def n_layers(self) -> int:
        """Return the number of blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def final_stream(self) -> str:
        """Return the name of the hook behind the last block."""
        return f"blocks.{self.n_layers - 1}.hook_resid_post"

    def prepare(self, pixels: Tensor, *, keep_final: bool = False) -> Prepared:
        """Run images up to the site and, without an edit, from there to their embeddings.

        Raises:
            ValueError: a hook of the site does not fire.
        """
        with in_eval_mode(self.model):
            return self._prepare(pixels, keep_final)

    def _prepare(self, pixels: Tensor, keep_final: bool) -> Prepared:
        entry = pixels if self.start is None else self.model(pixels, stop_at_layer=self.start)
        if self.is_stream:
            return Prepared(entry, entry, entry, entry, self.finish(entry))
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor, Any], None]:
            def hook_function(activation: Tensor, hook: Any) -> None:
                del hook
                seen[name] = activation.detach().clone()

            return hook_function

        hooks = self.site.hook_names
        names = {*hooks} | ({self.final_stream} if keep_final else set())
        with hooked(self.model, {name: keep(name) for name in names}):
            embedding = self.finish(entry)
        missing = [name for name in hooks if name not in seen]
        if missing:
            raise ValueError(
                f"{missing[0]} did not fire when the model ran, so nothing can be steered there; "
                "choose a hook that the forward pass goes through"
            )
        source, target = seen[self.site.hook_name], seen[self.site.hook_name_out]
        return Prepared(entry, source, target, seen.get(self.final_stream), embedding)

    def finish(self, entry: Tensor) -> Tensor:
        """Return embeddings ``[n, d_embed]``, not normalised, of a run from ``entry`` on."""
        kwargs = {} if self.start is None else {"start_at_layer": self.start}
        with in_eval_mode(self.model):
            embedding: Tensor = self.model.encode_image(entry, normalize=False, **kwargs)
        return embedding

    def finish_edited(self, entry: Tensor, edited: Tensor) -> Tensor:
        """Return the embeddings of a run with ``edited`` in place of the target's activation."""
        if self.is_stream:
            return self.finish(edited)

        def replace(activation: Tensor, hook: Any) -> Tensor:
            del hook
            return edited.reshape(activation.shape).to(activation.dtype)

        with hooked(self.model, {self.site.hook_name_out: replace}):
            return self.finish(entry)

    def slope(self, entry: Tensor, lead: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the gradient of a number per image at the hook that the site writes.

        Args:
            entry: Input of a pass from :attr:`start` on.
            lead: Returns the numbers ``[n]`` from unit embeddings ``[n, d_embed]``.
        """
        leaves: list[Tensor] = []

        def start_here(activation: Tensor) -> Tensor:
            leaves.append(activation.detach().requires_grad_())
            return leaves[0]

        embedding = self._features(entry, start_here)
        (gradient,) = torch.autograd.grad(lead(embedding).sum(), leaves[0])
        return gradient

    def features(self, entry: Tensor, edited: Tensor) -> Tensor:
        """Return unit embeddings of a run with ``edited`` in place of the target's activation."""
        return self._features(entry, lambda activation: edited.view_as(activation))

    def _features(self, entry: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        def run(activation: Tensor, hook: Any) -> Tensor:
            del hook
            return change(activation)

        kwargs = {} if self.start is None else {"start_at_layer": self.start}
        if self.is_stream:
            embedding: Tensor = self.model.image_features(change(entry), **kwargs)
        else:
            with hooked(self.model, {self.site.hook_name_out: run}):
                embedding = self.model.image_features(entry, **kwargs)
        return embedding

    def into_final_stream(self) -> Tensor | None:
        """Return the map of an edit at the site to an edit of the stream behind the last block.

        Returns:
            Float64 ``[d_target, d_model]`` for the last MLP's neurons and its output, from which a
            linear map leads to the stream; None for any other place.
        """
        model, last = self.model, self.n_layers - 1
        hooks = model.hook_dict
        place = hooks[self.site.hook_name_out]
        if place is hooks.get(f"blocks.{last}.hook_mlp_out"):
            return torch.eye(int(model.cfg.d_model), dtype=torch.float64, device=model.device)
        if place is not hooks.get(f"blocks.{last}.mlp.hook_post"):
            return None
        out = getattr(getattr(model.blocks[last].mlp, "out", None), "original_component", None)
        return out.weight.detach().double().T if isinstance(out, nn.Linear) else None

    def _block_of(self, name: str) -> int | None:
        """Return the first block to run for a hook; None for a hook before all blocks."""
        inside = re.match(r"blocks\.(\d+)\.", name)
        if inside:
            return int(inside.group(1))
        return self.n_layers if re.match(r"(ln_final|unembed)\b", name) else None


def repeat(tensor: Tensor, times: int) -> Tensor:
    """Return ``times`` copies of a batch, one after the other."""
    return tensor.expand(times, *tensor.shape).flatten(0, 1)


def check_texts_differ(texts: Tensor) -> None:
    """Raise ValueError if all text embeddings ``[concepts, d_embed]`` are one."""
    if len(texts) > 1 and bool(((texts - texts[:1]).abs() <= 1e-6 * texts[:1].abs().max()).all()):
        raise ValueError(
            f"all {len(texts)} concepts have the same text embedding, so nothing can move the "
            "answer from one to another; check the sentences that were embedded"
        )


def check_images(pixels: Tensor) -> None:
    """Raise unless ``pixels`` is a batch of images without NaN or infinity."""
    if pixels.ndim != 4 or pixels.shape[0] == 0:
        raise ValueError(
            f"pixels= must be [images, channels, height, width] with at least one image, got "
            f"{list(pixels.shape)}; model.preprocess(images) makes them"
        )
    bad = torch.nonzero(~pixels.isfinite().flatten(1).all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(
            f"pixels= of image {bad[0]} ({len(bad)} of {len(pixels)} images) hold NaN or infinity; "
            "leave them out"
        )
