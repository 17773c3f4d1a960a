"""Clamping latents, or neurons, while a model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vision_plugin.models import TokenSelection
from vision_plugin.models.dictionary import Dictionary, bare, join_heads
from vision_plugin.models.site import Site, hooked, token_mask


@contextmanager
def steer(
    model: Any, sae: Dictionary, latents: Mapping[int, float], *, tokens: str = "all"
) -> Iterator[None]:
    """Set latents of an SAE to fixed values within a ``with`` block.

    The SAE's reconstruction error is added back: the residual stream becomes
    ``x + decode(f') - decode(f)``, where f' is f with the latents overwritten. For a linear decoder
    this is ``x + d_k (s - f_k)``. Several blocks may nest, even at one hook.

    Args:
        model: A VisionBridge.
        sae: A ``sae_lens.SAE`` whose metadata names a hook of the model.
        latents: Value per latent; 0 suppresses it.
        tokens: Tokens to steer: ``"cls"``, ``"patch"``, ``"all"`` or ``"random:n"``.

    Raises:
        ValueError: a latent is out of range, a value is not finite, or the SAE does not belong to
            the model.
    """
    site = Site.of(model, sae, tokens=tokens)
    index, values = read_targets(latents, int(sae.cfg.d_sae))
    capture = site.capture()

    def overwrite(activation: Tensor, hook: Any) -> Tensor:
        del hook
        source = join_heads(capture.source(activation), int(sae.cfg.d_in))
        change = latent_change(sae, source, index, values)
        change = change.to(activation.dtype).reshape(activation.shape)
        mask = site.mask(activation)
        return activation + (change if mask is None else change * mask)

    reads = {site.hook_name: capture.keep} if capture.is_needed else {}
    with hooked(model, {**reads, site.hook_name_out: overwrite}):
        yield


@contextmanager
def steer_neurons(
    model: Any, hook_name: str, neurons: Mapping[int, float], *, tokens: str = "all"
) -> Iterator[None]:
    """Set single dimensions of the activation at a hook: the baseline for :func:`steer`.

    Args:
        model: A VisionBridge.
        hook_name: Any hook of the model.
        neurons: Value per dimension.
        tokens: Tokens to edit: ``"cls"``, ``"patch"``, ``"all"`` or ``"random:n"``.

    Raises:
        ValueError: a value is not finite, or a dimension is out of range (when the model runs).
    """
    model.check_hook_names([hook_name])
    selection = TokenSelection.parse(tokens)

    def overwrite(activation: Tensor, hook: Any) -> Tensor:
        del hook
        index, values = read_targets(neurons, activation.shape[-1])
        edited = activation.clone()
        edited[..., index.to(activation.device)] = values.to(activation)
        mask = token_mask(selection, model.token_layout(), activation)
        return edited if mask is None else torch.where(mask, edited, activation)

    with hooked(model, {hook_name: overwrite}):
        yield


def latent_change(sae: Dictionary, activation: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return the change that overwriting latents makes to an activation, ``[..., d_in]``.

    Args:
        sae: A ``sae_lens.SAE``.
        activation: Activation ``[..., d_in]``.
        index: Numbers of the latents, ``[m]``.
        values: New values of the latents, ``[m]``.
    """
    with bare(sae):
        # Some SAEs keep the input's scale from encode to decode: encode before every decode.
        before: Tensor = sae.decode(sae.encode(activation))
        latents = sae.encode(activation).clone()
        latents[..., index.to(latents.device)] = values.to(latents)
        after: Tensor = sae.decode(latents)
    return after - before


def read_targets(targets: Mapping[int, float], width: int) -> tuple[Tensor, Tensor]:
    """Return latents and their values as tensors ``[m]``; raise where one cannot be set."""
    for latent, value in targets.items():
        if not 0 <= latent < width:
            raise ValueError(f"latent {latent} is out of range: there are {width}, from 0")
        if not math.isfinite(value):
            raise ValueError(f"latent {latent} cannot be set to {value}: give a finite number")
    return torch.tensor(list(targets), dtype=torch.long), torch.tensor(list(targets.values()))
