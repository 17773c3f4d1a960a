"""Steering in one call: edits that clamp latents or neurons, or any edit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering._edit import Edit


def steer(
    model: Any,
    sae: Dictionary | Edit,
    latents: Mapping[int, float] | None = None,
    *,
    tokens: str | None = None,
    check_model: bool = True,
) -> AbstractContextManager[None]:
    """Set latents of an SAE to fixed values, or make any edit, within a ``with`` block.

    The SAE's reconstruction error is added back: the residual stream becomes
    ``x + decode(f') - decode(f)``, where f' is f with the latents overwritten. For a linear decoder
    this is ``x + d_k (s - f_k)``. Several blocks may nest, even at one hook.

    Args:
        model: A VisionBridge.
        sae: A ``sae_lens.SAE`` whose metadata names a hook of the model; or an :class:`Edit`, which
            says everything itself.
        latents: Value per latent; 0 suppresses it.
        tokens: Tokens to steer: ``"cls"``, ``"patch"``, ``"all"`` or ``"random:n"``; None steers
            the kind that the SAE was trained on, and leaves an Edit its own.
        check_model: Refuse an SAE that was trained on another model.

    Raises:
        ValueError: a latent is out of range, a value is not finite, or the SAE does not belong to
            the model.

    Examples:
        >>> with vp.steering.steer(model, sae, {12: 50.0}, tokens="all"):
        ...     steered = model.encode_image(pixels)
        >>> torch.equal(steered, embeddings)
        False
    """
    if isinstance(sae, Edit):
        if latents is not None:
            raise ValueError("an Edit names its latents itself: give no latents= beside it")
        if tokens is not None:
            raise ValueError("an Edit names its tokens itself: edit.with_tokens() changes them")
        return sae.on(model, check_model=check_model)
    if latents is None:
        raise ValueError("latents= is missing: give a value for each latent, as {123: 50.0}")
    return Edit.clamp(sae, latents, tokens=tokens).on(model, check_model=check_model)


def steer_neurons(
    model: Any, hook_name: str, neurons: Mapping[int, float], *, tokens: str = "all"
) -> AbstractContextManager[None]:
    """Set single dimensions of the activation at a hook: the baseline for :func:`steer`.

    Args:
        model: A VisionBridge.
        hook_name: Any hook of the model.
        neurons: Value per dimension.
        tokens: Tokens to edit: ``"cls"``, ``"patch"``, ``"all"`` or ``"random:n"``.

    Raises:
        ValueError: a value is not finite, or a dimension is out of range (when the model runs).

    Examples:
        >>> with vp.steering.steer_neurons(model, "blocks.2.hook_resid_post", {7: 20.0}):
        ...     edited, cache = model.run_with_cache(pixels)
        >>> bool((cache["blocks.2.hook_resid_post"][..., 7] == 20).all())
        True
    """
    return Edit.clamp(hook_name, neurons, tokens=tokens).on(model)
