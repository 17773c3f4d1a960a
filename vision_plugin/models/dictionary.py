"""The protocol of a dictionary, and functions that run one.

SAELens's SAEs and transcoders are dictionaries, and so are the controls of ``vp.metrics``. A
dictionary encodes activations to latents and decodes latents to activations. Its configuration
holds its widths and, in ``metadata``, its place in a model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from vision_plugin.kernels import SparseLatents


@runtime_checkable
class DictionaryConfig(Protocol):
    """The configuration of a dictionary."""

    @property
    def d_in(self) -> int:
        """Width of the activations that the dictionary encodes."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    @property
    def metadata(self) -> Any:
        """SAELens's metadata: ``hook_name``, ``hook_name_out``, ``tokens``, ``model_name``."""
        ...


@runtime_checkable
class Dictionary(Protocol):
    """Encodes activations to latents, and decodes latents to activations."""

    @property
    def cfg(self) -> Any:
        """Widths and metadata, see :class:`DictionaryConfig`."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Return latents ``[..., d_sae]`` of activations ``[..., d_in]``."""
        ...

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return activations of latents."""
        ...


def d_out(dictionary: Dictionary) -> int:
    """Return the width of a dictionary's output: a transcoder's ``d_out``, or else ``d_in``."""
    return int(getattr(dictionary.cfg, "d_out", None) or dictionary.cfg.d_in)


def is_sae_lens(dictionary: object) -> bool:
    """Return whether a dictionary is of a SAELens class, without importing SAELens."""
    sae_lens = sys.modules.get("sae_lens")
    return sae_lens is not None and isinstance(dictionary, sae_lens.SAE)


@contextmanager
def bare(dictionary: Dictionary) -> Iterator[None]:
    """Make a dictionary take flat activations, with its hook points silent.

    The hook points pass everything through, and an SAE that SAELens made for ``hook_z`` takes all
    heads as one vector.
    """
    with silent_hooks(dictionary), heads_joined(dictionary):
        yield


@contextmanager
def silent_hooks(dictionary: Dictionary) -> Iterator[None]:
    """Make the dictionary's own hook points pass everything through."""
    hooks = dict(getattr(dictionary, "hook_dict", {}))
    try:
        for name in hooks:
            setattr(dictionary, name, nn.Identity())
        yield
    finally:
        for name, hook in hooks.items():
            setattr(dictionary, name, hook)


@contextmanager
def heads_joined(dictionary: Any) -> Iterator[None]:
    """Make a dictionary take all heads of ``hook_z`` as one vector, ``[..., d_in]``.

    Some SAELens SAEs take ``[..., n_heads, d_head]`` there (``reshape_activations="hook_z"``).
    """
    if not getattr(dictionary, "hook_z_reshaping_mode", False):
        yield
        return
    dictionary.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        dictionary.turn_on_forward_pass_hook_z_reshaping()


def join_heads(activation: Tensor, width: int) -> Tensor:
    """Return ``[n, tokens, n_heads, d_head]`` as ``[n, tokens, width]``; keep other shapes."""
    if activation.ndim == 4 and activation.shape[-1] != width:
        return activation.flatten(-2)
    return activation


def reconstruct(dictionary: Any, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    """Encode and decode, on the sparse kernel where the dictionary allows it.

    Args:
        dictionary: Any dictionary; the skip term of a skip transcoder is added.
        x: Activations with all heads joined.
    """
    with heads_joined(dictionary):
        if not is_sae_lens(dictionary):
            decoded: Tensor = dictionary.decode(dictionary.encode(x))
            return decoded
        from vision_plugin.models._sparse_inference import add_skip, decode_of_encode

        output = decode_of_encode(dictionary, x)
        if output is None:
            output = dictionary.decode(dictionary.encode(x))
        return add_skip(dictionary, x, output)


def encode_and_decode(
    dictionary: Any, x: Float[Tensor, "*batch d_in"]
) -> tuple[SparseLatents | Tensor, Float[Tensor, "*batch d_out"]]:
    """Return latents and reconstruction.

    Args:
        dictionary: Any dictionary.
        x: Activations with all heads joined.

    Returns:
        Latents of every activation vector, leading axes flattened: compressed rows where the
        dictionary can make them, or else dense ``[rows, d_sae]``. Then the reconstruction.
    """
    with heads_joined(dictionary):
        if is_sae_lens(dictionary):
            from vision_plugin.models._sparse_inference import sparse_forward

            return sparse_forward(dictionary, x)
        if hasattr(dictionary, "sparse_forward") and getattr(dictionary, "k", None) is not None:
            sparse: tuple[SparseLatents, Tensor] = dictionary.sparse_forward(x)
            return sparse
        dense = dictionary.encode(x)
        return dense.flatten(0, -2), dictionary.decode(dense)


def encode(dictionary: Any, x: Float[Tensor, "*batch d_in"]) -> SparseLatents | Tensor:
    """Return the latents that :func:`encode_and_decode` returns, without decoding."""
    with heads_joined(dictionary):
        if is_sae_lens(dictionary):
            from vision_plugin.models._sparse_inference import sparse_latents

            return sparse_latents(dictionary, x)
        dense: Tensor = dictionary.encode(x).to(x.device)
        return dense.flatten(0, -2)
