"""The exact parts of an image embedding: one pass, then the algebra of the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vision_plugin.models._decomposition import Decomposition
from vision_plugin.models._errors import UnsupportedModelError
from vision_plugin.models._modes import in_eval_mode
from vision_plugin.models._own_hooks import hooked
from vision_plugin.models.heads import Gain, HeadWriter, values_by_head
from vision_plugin.models.readout import LinearReadout, Readout

TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference between the sum and the model's own result, by precision."""
EXACT = 1e-4
"""The same for all other precisions."""

Keep = Callable[[Tensor], Tensor]


@torch.no_grad()
def decompose(
    model: Any,
    pixels: Tensor,
    *,
    heads: bool,
    tokens: bool,
    onto: Tensor | None,
) -> Decomposition:
    """Return the parts of the embeddings; see :meth:`VisionBridge.decompose`."""
    model.check_pixels(pixels)
    readout: Readout = model.adapter.readout(model)
    layout = model.token_layout(tuple(pixels.shape[-2:]))
    rows = readout.rows(layout).to(model.device)
    one_token = readout.pool is None and len(rows) == 1
    keeps = _kept(model, rows, patterns=tokens and one_token)
    seen: dict[str, Tensor] = {}
    has_hooks = any(hook.fwd_hooks for hook in model.hook_dict.values())
    hooks, inside = hooked(model, _keepers(keeps, seen)), _inner_norms(model, rows, seen)
    with model.alone(), in_eval_mode(model), hooks, inside:
        actual = model.image_features(pixels, normalize=False)
    _check_seen(model, keeps, seen)
    actual = actual.to(_exact(actual.dtype))
    if onto is not None and (onto.ndim != 2 or onto.shape[1] != actual.shape[1]):
        raise ValueError(
            f"onto= is {list(onto.shape)}, not directions [n, {actual.shape[1]}] in the embedding "
            f"space of {model.cfg.model_name}: embed the texts with the same model"
        )
    directions = None if onto is None else onto.to(actual).T
    last = f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post"
    linear = readout.of(seen[last], directions)
    if directions is not None:
        actual = actual @ directions
    found = _parts(model, linear, seen, heads=heads, tokens=tokens, one_token=one_token)
    pool = None
    if tokens and not one_token:
        pool = linear.by_token(seen[last])
        pool = pool if heads and pool.shape[1] > 1 else pool.sum(1)
    result = Decomposition(
        embed=linear.part(seen["blocks.0.hook_resid_pre"]),
        bias=linear.bias,
        pool_mlp=linear.rest,
        pool=pool,
        hooks=None,
        has_heads=heads,
        has_tokens=tokens and one_token,
        layout=layout,
        read=readout.tokens,
        model_name=str(model.cfg.model_name),
        is_onto=onto is not None,
        **found,
    )
    return _checked(model, result, actual, has_hooks=has_hooks)


def _kept(model: Any, rows: Tensor, *, patterns: bool) -> dict[str, Keep]:
    """Return what to keep of each activation, by hook name."""

    def at_rows(x: Tensor) -> Tensor:
        return x.index_select(1, rows.to(x.device)).to(_exact(x.dtype))

    def of_row(x: Tensor) -> Tensor:
        return x[:, :, int(rows[0])].to(_exact(x.dtype))

    def whole(x: Tensor) -> Tensor:
        return x.to(_exact(x.dtype), copy=True)

    n_layers = int(model.cfg.n_layers)
    keeps: dict[str, Keep] = {
        "blocks.0.hook_resid_pre": at_rows,
        f"blocks.{n_layers - 1}.hook_resid_post": at_rows,
    }
    for block in range(n_layers):
        name = f"blocks.{block}"
        keeps |= {f"{name}.attn.hook_z": at_rows, f"{name}.hook_mlp_out": at_rows}
        keeps |= {f"{name}.attn.hook_in": at_rows, f"{name}.attn.hook_out": at_rows}
        if patterns:
            keeps |= {f"{name}.attn.hook_pattern": of_row, f"{name}.attn.hook_v": whole}
    return keeps


def _keepers(keeps: dict[str, Keep], seen: dict[str, Tensor]) -> dict[str, Any]:
    def keeper(name: str, keep: Keep) -> Callable[[Tensor, Any], None]:
        def see(activation: Tensor, hook: Any) -> None:
            del hook
            seen[name] = keep(activation.detach())

        return see

    return {name: keeper(name, keep) for name, keep in keeps.items()}


@contextmanager
def _inner_norms(model: Any, rows: Tensor, seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep what enters a normalisation inside the attention, in the families that have one."""
    handles = []
    for block in range(int(model.cfg.n_layers)):
        norm = model.blocks[block].attn.inner_norm
        if norm is None:
            continue

        def see(_: Any, args: tuple[Any, ...], name: str = f"blocks.{block}.inner") -> None:
            x = args[0].detach()
            seen[name] = x.index_select(1, rows.to(x.device)).to(_exact(x.dtype))

        handles.append(norm.register_forward_pre_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(
    model: Any,
    linear: LinearReadout,
    seen: dict[str, Tensor],
    *,
    heads: bool,
    tokens: bool,
    one_token: bool,
) -> dict[str, Tensor]:
    """Return the contributions of attention, its biases and MLPs, layers on the second axis."""
    n_heads, d_head = int(model.cfg.n_heads), int(model.cfg.d_head)
    attention, biases, mlps = [], [], []
    for block in range(int(model.cfg.n_layers)):
        name = f"blocks.{block}"
        writer = HeadWriter.of(model, block, seen[f"{name}.attn.hook_out"])
        z = seen[f"{name}.attn.hook_z"].flatten(2)
        gain: Gain | None = model.blocks[block].attn.gain(
            seen.get(f"{name}.inner"), seen[f"{name}.attn.hook_in"]
        )
        if tokens and one_token:
            values = values_by_head(seen[f"{name}.attn.hook_v"], n_heads, d_head)
            pattern = seen[f"{name}.attn.hook_pattern"]
            attention.append(writer.by_token(linear, pattern, values, gain, heads=heads))
        else:
            if gain is not None and gain.bias is not None:
                z = z - gain.bias
            split = z.unflatten(-1, (n_heads, d_head))
            attention.append(writer.by_head(linear, split, heads=heads))
        biases.append(writer.bias_part(linear, gain))
        mlps.append(linear.part(seen[f"{name}.hook_mlp_out"]))
    return {
        "attention": torch.stack(attention, 1),
        "attention_bias": torch.stack(biases, 1),
        "mlp": torch.stack(mlps, 1),
    }


def _check_seen(model: Any, keeps: dict[str, Keep], seen: dict[str, Tensor]) -> None:
    missing = [name for name in keeps if name not in seen]
    if missing:
        raise UnsupportedModelError(
            f"{model.cfg.model_name} did not run {missing[0]}, so its embedding cannot be taken "
            "apart"
        )


def _checked(model: Any, found: Decomposition, actual: Tensor, *, has_hooks: bool) -> Decomposition:
    """Return the decomposition if it sums to what the model computed.

    With hooks of a user's on the model, what they changed is a part of its own.

    Raises:
        UnsupportedModelError: the parts do not sum to the embedding.
    """
    total = found.total()
    if total.shape != actual.shape:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: its image embedding has {actual.shape[-1]} numbers and the "
            f"parts of it {total.shape[-1]}, so this tower has a head that the decomposition does "
            "not know"
        )
    left = actual - total
    if has_hooks:
        return found.with_hooks(left)
    if not bool(actual.isfinite().all()):
        raise ValueError(
            f"{model.cfg.model_name} gives NaN or infinity for these pixels, which has no parts: "
            "leave out the images whose pixels are no numbers"
        )
    size = float(actual.abs().max()) if actual.numel() else 0.0
    off = float(left.abs().max()) / max(size, 1e-6) if actual.numel() else 0.0
    limit = TOLERANCE.get(model.dtype, EXACT)
    if off > limit:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: the parts of its image embedding sum to something else, off "
            f"by {off:.1e} of its largest value, so this tower has a part that the decomposition "
            "does not know"
        )
    return found


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
