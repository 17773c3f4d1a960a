"""A site: a dictionary's hooks in a model and its tokens, and checks that both fit.

Splicing, steering, the training stream, evaluation and the report all read and replace activations
through a :class:`Site`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.models._capture import Capture
from vision_plugin.models._class_token import class_token_alone, reads_class_token
from vision_plugin.models._finite import require_finite
from vision_plugin.models._fit import (
    check_fit,
    has_signature,
    hook_names,
    hook_width,
    same_signature,
    signature,
    trained_tokens,
)
from vision_plugin.models._harvest import Harvester
from vision_plugin.models._modes import in_eval_mode
from vision_plugin.models._own_hooks import hooked, permanent_hook, remove_hook
from vision_plugin.models._token_latents import TokenLatents, encode_tokens
from vision_plugin.models._tokens import TokenLayout, TokenSelection
from vision_plugin.models.dictionary import Dictionary, join_heads

LATENT_ELEMENTS = 2**27
"""Largest number of latent values in a batch (512 MiB in float32)."""


@dataclass(frozen=True)
class Reading:
    """Activations of a batch of images at a site.

    Attributes:
        source: Activations that a dictionary encodes, ``[n, tokens, d_in]``.
        target: Activations that it should reconstruct, ``[n, tokens, d_out]``; the same tensor
            except for a transcoder.
        rows: Places of the selected tokens in the model's sequence, ``[n, tokens]``.
    """

    source: Float[Tensor, "n tokens d_in"]
    target: Float[Tensor, "n tokens d_out"]
    rows: Int[Tensor, "n selected"]

    def encode(self, dictionary: Dictionary) -> TokenLatents:
        """Return a dictionary's latents and reconstructions of these tokens."""
        return encode_tokens(dictionary, self.source)


@dataclass(frozen=True)
class Site:
    """A model, the hooks that a dictionary reads and writes, and the tokens it works on.

    Attributes:
        model: A VisionBridge.
        hook_name: Hook that a dictionary reads.
        hook_name_out: Hook that it writes; the same one except for a transcoder.
        tokens: ``"cls"``, ``"patch"``, ``"register"``, ``"all"`` or ``"random:n"``.
    """

    model: Any
    hook_name: str
    hook_name_out: str
    tokens: str = "all"

    @classmethod
    def of(
        cls,
        model: Any,
        dictionary: Dictionary,
        *,
        tokens: str | None = None,
        check_model: bool = True,
    ) -> Site:
        """Return the site of a dictionary in a model.

        Args:
            model: A VisionBridge.
            dictionary: A dictionary whose metadata names the hooks.
            tokens: Kind of token; None takes the kind that the dictionary was trained on.
            check_model: Refuse a dictionary that was trained on another model.

        Raises:
            UnknownHookError: the model has no such hook.
            ValueError: the dictionary names no hook, does not fit the model, or has weights that
                are not numbers.
        """
        require_finite(dictionary)
        hook_name, hook_name_out = hook_names(dictionary)
        model.check_hook_names([hook_name, hook_name_out])
        check_fit(model, dictionary, check_model=check_model)
        tokens = tokens or trained_tokens(dictionary)
        TokenSelection.parse(tokens)
        return cls(model, hook_name, hook_name_out, tokens)

    def capture(self) -> Capture:
        """Return what keeps the activation that is read until another one is written."""
        return Capture(self.model, self.hook_name, self.hook_name_out)

    @property
    def hook_names(self) -> list[str]:
        """Names of the hooks, each once."""
        return list(dict.fromkeys([self.hook_name, self.hook_name_out]))

    @property
    def selection(self) -> TokenSelection:
        """The selected tokens."""
        return TokenSelection.parse(self.tokens)

    @property
    def token_kinds(self) -> tuple[str, ...] | None:
        """Kind of each selected token of an image; None for random tokens and pooled hooks."""
        if self.selection.n_random is not None or not self.has_tokens:
            return None
        layout = self.model.token_layout()
        return tuple(layout.kinds[row] for row in layout.indices(self.selection.kind).tolist())

    @property
    def patch_rows(self) -> Int[Tensor, " patches"] | None:
        """Places of the patches among the selected tokens; None unless all patches are selected."""
        kinds = self.token_kinds or ()
        rows = torch.tensor([row for row, kind in enumerate(kinds) if kind == "patch"])
        return rows if len(rows) == self.model.token_layout().n_patches else None

    @cached_property
    def has_tokens(self) -> bool:
        """Whether the hook has one vector per token, and not one per image.

        Hooks before and in the blocks have. For any other hook, the model runs an empty image.
        """
        if self.hook_name.startswith(("blocks.", "embed.", "embed_ln.", "hook_")):
            return True
        size = self.model.adapter.tower_dimensions
        shape = (1, size.n_channels, *size.image_size)
        blank = torch.zeros(shape, device=self.model.device, dtype=self.model.dtype)
        return self.harvester()(blank)[self.hook_name].ndim > 2

    @property
    def n_tokens(self) -> int:
        """Number of selected tokens per image."""
        return self.selection.n_random or len(self.token_kinds or (None,))

    def images_at_once(self, width: int, batch_size: int) -> int:
        """Return how many images fit in memory together, at ``width`` numbers per token."""
        return min(batch_size, max(1, LATENT_ELEMENTS // max(1, self.n_tokens * width)))

    # ------------------------------------------------------------------ reading

    def harvester(self) -> Harvester:
        """Return a Harvester of this site's activations."""
        return Harvester(self.model, self.hook_names)

    def rows(
        self, n_images: int, generator: torch.Generator | None = None
    ) -> Int[Tensor, "n selected"]:
        """Return the places of the selected tokens of each image."""
        return self.selection.rows(self.model.token_layout(), n_images, generator)

    def read(
        self, found: Mapping[str, Tensor], rows: Int[Tensor, "n selected"] | None = None
    ) -> Reading:
        """Select the tokens from harvested activations.

        Args:
            found: Activations by hook name.
            rows: Places of the tokens, ``[n, tokens]``; None takes this site's selection.

        Raises:
            ValueError: an activation has no axis for the model's tokens.
        """
        source = found[self.hook_name]
        if rows is None:
            rows = self.rows(len(source))
        keep_all = self.selection == TokenSelection("all")
        n_tokens = self.model.token_layout().n_tokens
        parts = {
            name: select_tokens(found[name], rows, name, n_tokens=n_tokens, keep_all=keep_all)
            for name in self.hook_names
        }
        return Reading(parts[self.hook_name], parts[self.hook_name_out], rows)

    # ------------------------------------------------------------------ replacing

    def mask(self, activation: Tensor) -> Tensor | None:
        """Return ``[batch, tokens, 1...]``, True at the selected tokens; None for all of them."""
        return token_mask(self.selection, self.model.token_layout(), activation)

    def put(self, activation: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """Return the activation with ``values`` ``[n, tokens, d]`` at the places ``rows``."""
        new = values.to(activation.dtype)
        if activation.ndim == 2:
            return new[:, 0]
        flat = activation.flatten(2)
        places = rows.to(flat.device)[..., None].expand(-1, -1, flat.shape[-1])
        return flat.scatter(1, places, new).view_as(activation)

    @contextmanager
    def replaced(self, rows: Tensor, values: Tensor) -> Iterator[None]:
        """Replace the activations that a dictionary writes by ``values`` ``[n, tokens, d]``."""

        def replace(activation: Tensor, hook: Any) -> Tensor:
            del hook
            return self.put(activation, rows, values)

        with self.model.hooks(fwd_hooks=[(self.hook_name_out, replace)]):
            yield


def select_tokens(
    activation: Tensor, rows: Tensor, hook_name: str, *, n_tokens: int, keep_all: bool = False
) -> Float[Tensor, "n selected d"]:
    """Return the activations of some tokens, with all heads joined.

    Args:
        activation: ``[n, tokens, d]``, ``[n, tokens, n_heads, d_head]``, or ``[n, d]`` of a pooled
            hook, which counts as one token.
        rows: Places of the tokens, ``[n, selected]``.
        hook_name: Name of the hook in errors.
        n_tokens: Length of the model's sequence.
        keep_all: Whether all tokens are selected, so that nothing is copied.

    Raises:
        ValueError: the second axis does not have the model's tokens.
    """
    if activation.ndim == 4:
        activation = activation.flatten(-2)
    if activation.ndim == 2:
        return activation.unsqueeze(1)
    if activation.ndim != 3 or activation.shape[1] != n_tokens:
        raise ValueError(
            f"{hook_name} gives {list(activation.shape)}, which does not have the model's "
            f"{n_tokens} tokens in the second dimension, so no tokens can be selected there; "
            "choose a hook with one vector per token"
        )
    if keep_all:
        return activation
    rows = rows.to(activation.device)
    return activation.gather(1, rows[..., None].expand(-1, -1, activation.shape[-1]))


def token_mask(selection: TokenSelection, layout: TokenLayout, activation: Tensor) -> Tensor | None:
    """Return ``[batch, tokens, 1...]``, True at the selected tokens; None for all of them.

    Raises:
        ValueError: the activation has no axis for the model's tokens.
    """
    if selection == TokenSelection("all") or activation.ndim < 3:
        return None
    if activation.shape[1] != layout.n_tokens:
        raise ValueError(
            f"tokens={selection.kind!r} needs the model's {layout.n_tokens} tokens in the second "
            f"dimension, but this hook gives {list(activation.shape)}"
        )
    mask = selection.mask(layout, activation.shape[0]).to(activation.device)
    return mask.reshape(*mask.shape, *[1] * (activation.ndim - 2))


__all__ = [
    "LATENT_ELEMENTS",
    "Dictionary",
    "Reading",
    "Site",
    "check_fit",
    "class_token_alone",
    "has_signature",
    "hook_names",
    "hook_width",
    "hooked",
    "in_eval_mode",
    "join_heads",
    "permanent_hook",
    "reads_class_token",
    "remove_hook",
    "require_finite",
    "same_signature",
    "select_tokens",
    "signature",
    "token_mask",
    "trained_tokens",
]
