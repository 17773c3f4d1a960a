"""What is checked of a vision transformer under the bridge, whatever its family.

Each check returns a number (the largest difference found) or raises AssertionError with a reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vision_plugin as vp
from vision_plugin.models import Harvester

Native = Callable[[nn.Module, Tensor], Tensor]
SCALE = 10.0


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the larger of one and the largest value.

    What is not a number in both (scaled weights can overflow natively too) counts as equal.
    """
    assert a.shape == b.shape, f"shapes differ: {list(a.shape)} and {list(b.shape)}"
    if bool(((a == b) | (a.isnan() & b.isnan())).all()):
        return 0.0
    return float((a.double() - b.double()).abs().max() / max(1.0, float(b.double().abs().max())))


@torch.no_grad()
def output_error(model: Any, native: Native, pixels: Tensor) -> float:
    """Bridge against native module, with nothing hooked."""
    return difference(model(pixels), native(model.native, pixels))


@torch.no_grad()
def hooked_error(model: Any, native: Native, pixels: Tensor) -> float:
    """Bridge against native module, with every hook read."""
    output, _ = model.run_with_cache(pixels)
    return difference(output, native(model.native, pixels))


@torch.no_grad()
def outlier_error(model: Any, native: Native, pixels: Tensor) -> float:
    """The same with every weight matrix scaled up, of a copy of the native module."""
    module = copy.deepcopy(model.native)
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(SCALE)
    return output_error(vp.wrap(module), native, pixels)


@torch.no_grad()
def residual_error(model: Any, pixels: Tensor) -> float:
    """Residual stream against the sum of what was added to it, block by block and in all."""
    _, cache = model.run_with_cache(pixels)
    worst = 0.0
    for layer in range(model.cfg.n_layers):
        before, after = cache["resid_pre", layer], cache["resid_post", layer]
        middle = before + cache["attn_out", layer]
        worst = max(worst, difference(middle, cache["resid_mid", layer]))
        worst = max(worst, difference(middle + cache["mlp_out", layer], after))
    parts = cache.decompose_resid(model.cfg.n_layers, mode="all")
    total = cache["resid_post", model.cfg.n_layers - 1]
    return max(worst, difference(parts.sum(0), total))


@torch.no_grad()
def stretch_error(model: Any, pixels: Tensor) -> float:
    """Stopping at each layer and starting there again, against the whole pass."""
    whole = model(pixels)
    size = tuple(pixels.shape[-2:])
    worst = 0.0
    for layer in range(model.cfg.n_layers + 1):
        residual = model(pixels, stop_at_layer=layer)
        again = model(residual, start_at_layer=layer, image_size=size)
        worst = max(worst, difference(again, whole))
    return worst


@torch.no_grad()
def pattern_error(model: Any, pixels: Tensor) -> float:
    """Rows of every pattern against one; and an edit must reach the output."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    output, cache = model.run_with_cache(pixels, names_filter=names)
    worst = 0.0
    for name in names:
        n_tokens = model.token_layout(tuple(pixels.shape[-2:])).n_tokens
        expected = (len(pixels), model.cfg.n_heads, n_tokens, n_tokens)
        assert tuple(cache[name].shape) == expected, f"{name} is {list(cache[name].shape)}"
        worst = max(worst, float((cache[name].float().sum(-1) - 1).abs().max()))
    for name in names[:1]:
        edited = model.run_with_hooks(
            pixels, fwd_hooks=[(name, lambda pattern, hook: torch.zeros_like(pattern))]
        )
        assert not torch.equal(edited, output), f"zeroing {name} changed nothing"
    return worst


@torch.no_grad()
def head_error(model: Any, pixels: Tensor) -> float:
    """The heads' results, summed with the bias, against the attention's output."""
    name, output_name = "blocks.0.attn.hook_result", "blocks.0.attn.hook_out"
    _, plain = model.run_with_cache(pixels, names_filter=[output_name])
    model.set_use_attn_result(True)
    try:
        _, cache = model.run_with_cache(pixels, names_filter=[name])
    finally:
        model.set_use_attn_result(False)
    results = cache[name]
    expected = (*plain[output_name].shape[:2], model.cfg.n_heads, model.cfg.d_model)
    assert tuple(results.shape) == expected, f"{name} is {list(results.shape)}"
    bias = model.blocks[0].attn.o.original_component.bias
    total = results.sum(2) if bias is None else results.sum(2) + bias
    return difference(total, plain[output_name])


@torch.no_grad()
def silent_hooks(model: Any, pixels: Tensor) -> list[str]:
    """Canonical names under which no hook fires."""
    fired: set[str] = set()
    names = canonical_names(model)
    missing = [name for name in names if name not in model.hook_dict]
    present = [name for name in names if name in model.hook_dict]

    def note(name: str) -> Callable[..., None]:
        def see(tensor: Tensor, hook: Any) -> None:
            del tensor, hook
            fired.add(name)

        return see

    model.run_with_hooks(pixels, fwd_hooks=[(name, note(name)) for name in present])
    return [*missing, *(name for name in present if name not in fired)]


def canonical_names(model: Any) -> list[str]:
    """The names every family has, of the first and the last block."""
    names = ["hook_embed"]
    if "pos_embed" in model._modules:
        names.append("hook_pos_embed")
    if "ln_final" in model._modules:
        names.append("ln_final.hook_normalized")
    for layer in {0, model.cfg.n_layers - 1}:
        block = f"blocks.{layer}"
        names += [f"{block}.hook_resid_{place}" for place in ("pre", "mid", "post")]
        names += [f"{block}.hook_attn_out", f"{block}.hook_mlp_out"]
        names += [f"{block}.attn.hook_{part}" for part in ("q", "k", "v", "z")]
        names += [f"{block}.attn.hook_attn_scores", f"{block}.attn.hook_pattern"]
        names += [f"{block}.mlp.hook_pre", f"{block}.mlp.hook_post"]
    return names


@torch.no_grad()
def edit_reaches_output(model: Any, pixels: Tensor) -> list[str]:
    """Names where an edit changes nothing behind it: attention, MLP, residual, positions."""
    pixels = pixels[:1]
    clean = model(pixels)
    names = [f"blocks.0.attn.hook_{part}" for part in ("q", "k", "v", "z")]
    names += ["blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post", "hook_embed"]
    names += [f"blocks.0.hook_{part}" for part in ("attn_out", "mlp_out", "resid_mid")]
    if "pos_embed" in model._modules:
        names.append("hook_pos_embed")
    deaf = []
    for name in names:
        noise = torch.Generator().manual_seed(0)

        def disturb(tensor: Tensor, hook: Any, noise: torch.Generator = noise) -> Tensor:
            del hook
            return tensor + torch.randn(tensor.shape, generator=noise).to(tensor) * 3

        edited = model.run_with_hooks(pixels, fwd_hooks=[(name, disturb)])
        if torch.equal(edited, clean):
            deaf.append(name)
    return deaf


@torch.no_grad()
def harvest_error(model: Any, pixels: Tensor) -> float:
    """The harvest path against the bridge's cache, for what the native forward forms."""
    sources, hooks = model.adapter.harvest_sources(model), model.hook_dict
    names = [name for name in canonical_names(model) if hooks[name].name in sources]
    wanted = {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"}
    have = {name.rpartition("hook_")[2] for name in names}
    assert wanted <= have, f"cannot be harvested: {sorted(wanted - have)}"
    harvested = Harvester(model, names)(pixels)
    worst = 0.0
    # Reading inside the attention may take the explicit path, so what is inside comes one by one.
    inside = [name for name in names if ".attn.hook_" in name]
    groups = [[name for name in names if name not in inside], *([name] for name in inside)]
    for group in groups:
        _, cache = model.run_with_cache(pixels, names_filter=group)
        worst = max(worst, *(difference(harvested[name], cache[name]) for name in group))
    return worst


@torch.no_grad()
def half_error(model: Any, native: Native, pixels: Tensor) -> float:
    """Bridge against native module in bfloat16."""
    half = vp.wrap(copy.deepcopy(model.native).to(torch.bfloat16))
    pixels = pixels.to(torch.bfloat16)
    half.run_with_cache(pixels)
    return output_error(half, native, pixels)


def gradient_flows(model: Any, pixels: Tensor) -> bool:
    """Whether the gradient of the output reaches the first block's residual stream."""
    found: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        leaf = tensor.detach().requires_grad_()
        found.append(leaf)
        return leaf

    output = model.run_with_hooks(pixels, fwd_hooks=[("blocks.0.hook_resid_pre", keep)])
    output.float().pow(2).sum().backward()
    gradient = found[0].grad
    return gradient is not None and bool(gradient.abs().sum() > 0)
