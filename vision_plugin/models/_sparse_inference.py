"""Encode and decode with SAELens's SAEs without ever holding dense latents."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.standard_sae import StandardSAE, StandardTrainingSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from torch import Tensor, nn

from vision_plugin import kernels
from vision_plugin.kernels import SparseLatents

# An architecture without a sparse path has at most this many dense latent values at a time.
_DENSE_ELEMENTS = 1 << 24

_PLAIN_DECODERS = (JumpReLUSAE.decode, StandardSAE.decode, TrainingSAE.decode)
_RESCALING_DECODERS = (TopKSAE.decode, TopKTrainingSAE.decode)


def sparse_latents(sae: SAE[Any], x: Float[Tensor, "*batch d_in"]) -> SparseLatents:
    """Return the latents of ``sae.encode(x)`` in compressed rows.

    TopK, BatchTopK (which SAELens saves as JumpReLU), JumpReLU and standard SAEs run on the sparse
    kernel. Any other architecture, and an SAE with a hook on its latents, runs its own ``encode``
    on a few rows at a time; the result is the same.

    Args:
        sae: Any SAELens SAE.
        x: Activations in the shape that ``sae.encode`` takes.

    Returns:
        One row per activation vector (leading axes flattened) without zeros, differentiable in x
        and the SAE's parameters. Values differ from ``sae.encode``'s by rounding at most.

    Examples:
        >>> rows = vp.models.sparse_latents(sae, acts[:, 0])
        >>> torch.allclose(rows.to_dense(), sae.encode(acts[:, 0]), atol=1e-4)
        True
    """
    if (encoded := _encode_on_kernel(sae, x)) is not None:
        return encoded.prune()
    return _stack([_compress(_dense(sae.encode(part))) for part in _parts(sae, x)])


def sparse_forward(
    sae: SAE[Any], x: Float[Tensor, "*batch d_in"]
) -> tuple[SparseLatents, Float[Tensor, "*batch d_out"]]:
    """Return latents in compressed rows, and the output of the SAE or transcoder.

    Args:
        sae: Any SAELens SAE or (skip) transcoder.
        x: Activations in the shape that ``sae.encode`` takes.

    Returns:
        The latents of :func:`sparse_latents`, and ``sae.decode(sae.encode(x))`` in the shape of x,
        plus a skip transcoder's skip term. Dense latents exist for a few rows at most.

    Examples:
        >>> rows, output = vp.models.sparse_forward(sae, acts)
        >>> rows.batch, output.shape
        (520, torch.Size([8, 65, 128]))
    """
    if (encoded := _encode_on_kernel(sae, x)) is not None and _decodes_on_kernel(sae):
        return encoded.prune(), _decode_on_kernel(sae, encoded, x)
    latents, outputs = [], []
    for part in _parts(sae, x):
        encoded_part = sae.encode(part)
        latents.append(_compress(_dense(encoded_part)))
        outputs.append(add_skip(sae, part, sae.decode(encoded_part)))
    shape = x.shape[: x.ndim - _n_trailing(sae)]
    return _stack(latents), torch.cat(outputs).view(*shape, *outputs[0].shape[1:])


def add_skip(
    sae: Any, x: Float[Tensor, "*batch d_in"], decoded: Float[Tensor, "*batch d_out"]
) -> Float[Tensor, "*batch d_out"]:
    """Return a reconstruction plus the skip term of a skip transcoder, if there is one."""
    skip = getattr(sae, "W_skip", None)
    return decoded if skip is None else decoded + x.to(sae.dtype) @ skip.T.to(x.device)


def decode_of_encode(
    sae: Any, x: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, "*batch d_in"] | None:
    """Return ``sae.decode(sae.encode(x))`` from the sparse kernel; None where it cannot run.

    It cannot run for other architectures, for dictionaries outside SAELens's classes, and while
    a hook watches the latents.
    """
    if not _decodes_on_kernel(sae) or (latents := _encode_on_kernel(sae, x)) is None:
        return None
    return _decode_on_kernel(sae, latents, x)


def _decodes_on_kernel(sae: Any) -> bool:
    return type(sae).decode in (*_PLAIN_DECODERS, *_RESCALING_DECODERS)


def _decode_on_kernel(sae: Any, latents: SparseLatents, x: Tensor) -> Tensor:
    shape = x.shape[: x.ndim - _n_trailing(sae)]
    decoded = kernels.csr_decode(_unscale(sae, latents), sae.W_dec, sae.b_dec)
    out = sae.hook_sae_recons(decoded.view(*shape, decoded.shape[-1]))
    reshaped: Tensor = sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(out), sae.d_head)
    return reshaped


def _n_trailing(sae: SAE[Any]) -> int:
    """Return the axes of one activation vector: two where the SAE takes all heads of hook_z."""
    return 2 if sae.hook_z_reshaping_mode else 1


def _parts(sae: SAE[Any], x: Tensor) -> tuple[Tensor, ...]:
    """Split activation vectors into parts small enough for dense latents."""
    rows = x.reshape(-1, *x.shape[x.ndim - _n_trailing(sae) :])
    if type(sae.activation_fn) is BatchTopK:  # it selects over the whole batch
        return (rows,)
    return torch.split(rows, max(1, _DENSE_ELEMENTS // int(sae.cfg.d_sae)))


def _encode_on_kernel(sae: SAE[Any], x: Tensor) -> SparseLatents | None:
    """Return the latents from the sparse kernel, or None where the SAE needs its own code."""
    if _is_live(sae.hook_sae_acts_pre) or _is_live(sae.hook_sae_acts_post):
        return None
    kind = type(sae)
    training = kind.encode is TrainingSAE.encode
    encode = kind.encode_with_hidden_pre if training else kind.encode
    if encode in (TopKSAE.encode, TopKTrainingSAE.encode_with_hidden_pre):
        if type(sae.activation_fn) not in (TopK, BatchTopK):
            return None
    elif encode is JumpReLUSAE.encode or encode in _RELU_ENCODERS:
        if type(sae.activation_fn) is not nn.ReLU:
            return None
        if getattr(sae.cfg, "noise_standard_deviation", 0) and sae.training:
            return None
    else:
        return None
    rows, b_in = _kernel_input(sae, x)
    if encode is JumpReLUSAE.encode or encode in _RELU_ENCODERS:
        threshold = getattr(sae, "threshold", None)
        if threshold is None:
            threshold = torch.zeros_like(sae.b_enc)
        return kernels.threshold_encode(rows, sae.W_enc, sae.b_enc, threshold, b_in=b_in)
    scale = _scale(sae)
    if type(sae.activation_fn) is BatchTopK:
        latents = kernels.batch_topk_encode(
            rows, sae.W_enc, sae.b_enc, sae.cfg.k, b_in=b_in, scale=scale
        )
    else:
        values, indices = kernels.topk_encode(
            rows, sae.W_enc, sae.b_enc, sae.cfg.k, b_in=b_in, scale=scale
        )
        latents = SparseLatents.from_topk(values, indices, d_sae=sae.cfg.d_sae, trusted=True)
    if scale is None:
        return latents
    return latents.with_values(latents.values * scale[latents.indices.long()])


_RELU_ENCODERS = (StandardSAE.encode, StandardTrainingSAE.encode_with_hidden_pre)


def _kernel_input(sae: SAE[Any], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return rows as in SAELens's `process_sae_in`, and the b_dec that is yet to be subtracted."""
    shaped = sae.hook_sae_input(sae.reshape_fn_in(x.to(sae.dtype)))
    rows = sae.run_time_activation_norm_fn_in(shaped)
    return rows.reshape(-1, rows.shape[-1]), sae.b_dec if sae.cfg.apply_b_dec_to_input else None


def _scale(sae: SAE[Any]) -> Tensor | None:
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        norms: Tensor = sae.W_dec.norm(dim=-1)
        return norms
    return None


def _unscale(sae: SAE[Any], latents: SparseLatents) -> SparseLatents:
    if type(sae).decode not in _RESCALING_DECODERS or (scale := _scale(sae)) is None:
        return latents
    return latents.with_values(latents.values * (1 / scale)[latents.indices.long()])


def _dense(encoded: Tensor) -> Tensor:
    dense = encoded.to_dense() if encoded.is_sparse else encoded
    return dense.reshape(-1, dense.shape[-1])


def _compress(dense: Float[Tensor, "batch d_sae"]) -> SparseLatents:
    batch, d_sae = dense.shape
    row, column = dense.nonzero(as_tuple=True)
    edges = torch.arange(batch + 1, device=dense.device)
    offsets = torch.searchsorted(row, edges, out_int32=True)
    return SparseLatents(dense[row, column], column.int(), offsets, d_sae)


def _stack(parts: list[SparseLatents]) -> SparseLatents:
    """Join batches in order."""
    offsets, end = [parts[0].offsets], parts[0].values.numel()
    for part in parts[1:]:
        offsets.append(part.offsets[1:] + end)
        end += part.values.numel()
    return SparseLatents(
        torch.cat([part.values for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat(offsets),
        parts[0].d_sae,
    )


def _is_live(hook: nn.Module) -> bool:
    return bool(hook._forward_hooks or hook._forward_pre_hooks or hook._backward_hooks)
