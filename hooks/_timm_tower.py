"""A timm ``VisionTransformer`` or ``Eva`` as a tower: sizes, parts, attention.

timm models use it, and open_clip models whose image tower is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vision_plugin.hooks._adapter import Dimensions, Paths
from vision_plugin.hooks._components import VisionAttentionBridge
from vision_plugin.hooks._restructure import (
    BlockStack,
    FusedWeights,
    Scaled,
    SplitLinear,
    tap_positions,
)
from vision_plugin.models import UnsupportedModelError
from vision_plugin.models.heads import Gain
from vision_plugin.models.readout import AttentionPool, Readout

BLOCKS = {
    "Block": "norms before",
    "ResPostBlock": "norms after",
    "EvaBlock": "norms before",
    "EvaBlockPostNorm": "norms after",
}
"""Kinds of blocks whose residual stream has the canonical hooks, and the place of their norms."""

WHY_NOT = {
    "ParallelScalingBlock": "attention and MLP run side by side, so there is no hook_resid_mid",
    "DiffParallelScalingBlock": "attention and MLP run side by side, so there is no hook_resid_mid",
    "ParallelThingsBlock": "a block has several attentions and several MLPs",
    "DiffAttention": "differential attention subtracts two patterns per head",
}


class TimmAttentionBridge(VisionAttentionBridge):
    """timm's ``Attention``, ``AttentionRope`` and ``EvaAttention``.

    They may have fused or separate projections, normalised queries and keys, rotary positions,
    fewer heads for keys and values, and a norm or a gate before the output projection.
    """

    def pack(self, output: Tensor) -> Any:
        """Return the output alone: timm's attention returns a tensor."""
        return output

    @property
    def _native(self) -> Any:
        return self.original_component

    def project(
        self, hidden: Tensor, *, rope: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values as they enter the scores."""
        del kwargs
        native = self._native
        if native.qkv is not None:
            fused = native.qkv(hidden).unflatten(-1, (3, native.num_heads, -1))
            q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                self.split_heads(projection(hidden))
                for projection in (native.q_proj, native.k_proj, native.v_proj)
            )
        q, k = native.q_norm(q), native.k_norm(k)
        if rope is not None:
            q, k = self.rotate(q, k, self._rotation(rope))
            q, k = q.type_as(v), k.type_as(v)
        groups = getattr(native, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q, k, v

    def _rotation(self, rope: Tensor) -> Any:
        from timm.layers import apply_rot_embed_cat

        n_prefix, half = self._native.num_prefix_tokens, self._native.rotate_half

        def rotation(x: Tensor) -> Tensor:
            turned = apply_rot_embed_cat(x[:, :, n_prefix:, :], rope, half=half)
            return torch.cat([x[:, :, :n_prefix, :], turned], dim=2)

        return rotation

    def attend(self, hidden: Tensor, *, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run explicit attention with timm's argument names."""
        kwargs.pop("is_causal", None)
        return super().attend(hidden, attention_mask=attn_mask, **kwargs)

    def native_kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Run timm's own choice between its two kernels."""
        if self._native.fused_attn:
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = (q * self.scaling) @ k.transpose(-2, -1)
        return (scores if mask is None else scores + mask).softmax(dim=-1) @ v

    def combine(self, z: Tensor, hidden: Tensor) -> Tensor:
        """Join the heads, then apply timm's norm and gate."""
        joined: Tensor = self._native.norm(super().combine(z, hidden))
        gate = self._native.gate
        return joined if gate is None else joined * gate(hidden).sigmoid()

    @property
    def inner_norm(self) -> Any:
        """timm's norm of the joined heads."""
        norm = self._native.norm
        return None if isinstance(norm, nn.Identity) else norm

    def gain(self, seen: Tensor | None, hidden: Tensor) -> Gain | None:
        """Return the norm's and the gate's factors."""
        gate = self._native.gate
        after = None
        if gate is not None:
            after = gate(hidden.to(gate.weight.dtype)).sigmoid().to(hidden.dtype)
        return Gain.of(self.inner_norm, seen, after=after)

    def output_projection(self, z: Tensor) -> Tensor:
        """Apply the output projection and its dropout."""
        output: Tensor = self._native.proj_drop(self.o(z))
        return output


def is_timm_tower(module: nn.Module) -> bool:
    """Return whether this file describes the module's class."""
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("timm.")}
    return bool(names & {"VisionTransformer", "Eva"})


def check(tower: Any) -> None:
    """Raise for a tower without the canonical residual stream or attention pattern.

    Raises:
        UnsupportedModelError: the message names the part.
    """
    block = tower.blocks[0]
    kind = type(block).__name__
    attention = type(getattr(block, "attn", None)).__name__
    for part in (kind, attention):
        if part in WHY_NOT:
            raise UnsupportedModelError(f"its {part} is not supported: {WHY_NOT[part]}")
    if kind not in BLOCKS:
        raise UnsupportedModelError(
            f"its blocks are {kind}; supported are {', '.join(sorted(BLOCKS))}"
        )
    if attention not in ("Attention", "AttentionRope", "EvaAttention"):
        raise UnsupportedModelError(
            f"its attention is a {attention}; supported are Attention, AttentionRope, EvaAttention"
        )


def dimensions(tower: Any) -> Dimensions:
    """Return the sizes of a timm tower.

    Raises:
        UnsupportedModelError: a part is of an unsupported kind.
    """
    check(tower)
    block, embed = tower.blocks[0], tower.patch_embed
    n_cls = int(tower.cls_token is not None) + int(hasattr(tower, "dist_token"))
    norm = getattr(block, "norm1", None)
    ratio = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else embed.patch_size
    return Dimensions(
        d_model=tower.embed_dim,
        n_heads=block.attn.num_heads,
        n_layers=len(tower.blocks),
        d_mlp=block.mlp.fc2.in_features,
        image_size=tuple(embed.img_size),
        patch_size=tuple(ratio),
        n_cls=n_cls,
        n_registers=tower.num_prefix_tokens - n_cls,
        eps=float(getattr(norm, "eps", 1e-6)),
        n_channels=tower.in_chans,
        d_head=block.attn.head_dim,
        any_size=bool(tower.dynamic_img_size),
        pads=bool(getattr(embed, "dynamic_img_pad", False)),
        rotary=getattr(tower, "rope", None) is not None,
    )


def paths(tower: Any, prefix: str = "") -> Paths:
    """Return the parts of a timm tower after :func:`restructure`.

    Args:
        tower: The tower.
        prefix: Its path in the wrapped module, with a dot at the end, or empty.
    """
    block = tower.blocks[0]
    after = BLOCKS[type(block).__name__] == "norms after"
    pre_norm = not isinstance(tower.norm_pre, nn.Identity)
    stacked = isinstance(tower.blocks, BlockStack)
    fused = block.attn.qkv is not None
    scales = _scales(block)
    mlp = _mlp_paths(block.mlp)
    before_norm = "pos_drop" if type(block).__name__.startswith("Eva") else "patch_drop"
    return Paths(
        embed=prefix + (before_norm if pre_norm else "norm_pre"),
        embed_ln=f"{prefix}norm_pre" if pre_norm else None,
        pos_embed=None if tower.pos_embed is None else f"{prefix}position_tap",
        blocks=f"{prefix}blocks.layers" if stacked else f"{prefix}blocks",
        ln1=None if after else "norm1",
        attn="attn",
        q="qkv.q" if fused else "q_proj",
        k="qkv.k" if fused else "k_proj",
        v="qkv.v" if fused else "v_proj",
        o="proj",
        ln1_post="norm1" if after else scales[0],
        ln2=None if after else "norm2",
        mlp="mlp",
        ln2_post="norm2" if after else scales[1],
        ln_final=_first_module(tower, prefix, "norm", "fc_norm"),
        unembed=f"{prefix}head" if isinstance(tower.head, nn.Linear) else None,
        **mlp,
    )


def restructure(tower: Any) -> None:
    """Split the fused projections, unroll the blocks, and make LayerScale and positions modules."""
    for block in tower.blocks:
        _split_attention(block.attn)
        _split_mlp(block.mlp)
        for number in (1, 2):
            gamma = getattr(block, f"gamma_{number}", None)
            if gamma is not None:
                setattr(block, f"gamma_{number}", None)
                drop_path = getattr(block, f"drop_path{number}")
                setattr(block, f"drop_path{number}", Scaled(gamma, drop_path))
    if isinstance(tower.blocks, nn.Sequential):
        tower.blocks = BlockStack(tower.blocks)
    if tower.pos_embed is not None:
        tap_positions(tower, "pos_embed", "_pos_embed")


def readout(tower: Any, projections: tuple[Any, ...] = ()) -> Readout:
    """Return the way from the last residual stream to the pooled vector and beyond.

    Args:
        tower: The tower.
        projections: Linear maps behind the pooled vector.

    Raises:
        UnsupportedModelError: the pool is no linear map of the tokens, once its attention is held.
    """
    kind = "map" if tower.attn_pool is not None else tower.global_pool
    if kind not in ("token", "avg", "map"):
        raise UnsupportedModelError(
            f"its pool {kind!r} cannot be taken apart: supported are 'token', 'avg' and 'map'"
        )
    with_prefix = getattr(tower, "pool_include_prefix", kind == "map")
    with_prefix = with_prefix or tower.num_prefix_tokens == 0
    tokens = "cls" if kind == "token" else "all" if with_prefix else "patch"
    pool = _attention_pool(tower.attn_pool) if kind == "map" else None
    return Readout(tokens, tower.norm, pool, tower.fc_norm, projections)


def _attention_pool(pool: Any) -> AttentionPool:
    if getattr(pool, "pos_embed", None) is not None or pool.latent_len != 1:
        raise UnsupportedModelError(
            "its attention pool has positions or several queries, which cannot be taken apart"
        )
    heads, width = pool.num_heads, pool.head_dim
    key, value = pool.kv.weight.detach().chunk(2)
    biases = [None, None] if pool.kv.bias is None else list(pool.kv.bias.detach().chunk(2))
    query = pool.q_norm(pool.q(pool.latent).view(1, 1, heads, width))[0, 0].detach() * pool.scale
    projects = isinstance(pool.proj, nn.Linear)

    def mlp(pooled: Tensor) -> Tensor:
        hidden = pooled.to(pool.kv.weight.dtype)[:, None]
        output: Tensor = pool.mlp(pool.norm(hidden))[:, 0]
        return output

    return AttentionPool(
        query,
        key.T,
        biases[0],
        value.T,
        biases[1],
        pool.proj.weight.detach().T if projects else torch.eye(heads * width).to(query),
        pool.proj.bias.detach() if projects and pool.proj.bias is not None else None,
        key_norm=pool.k_norm,
        mlp=None if pool.mlp is None else mlp,
    )


def native_path(path: str) -> str:
    """Return the path that :func:`restructure` moved to ``path``."""
    return path.replace("blocks.layers.", "blocks.")


def scale_places(tower: Any) -> list[tuple[int, int, str]]:
    """Return where a native Eva block has its scaled branches: (block, 1 or 2, submodule)."""
    return [
        (index, number, f"blocks.{index}.drop_path{number}")
        for index, block in enumerate(tower.blocks)
        for number in (1, 2)
        if getattr(block, f"gamma_{number}", None) is not None
    ]


def _split_attention(attention: Any) -> None:
    if attention.qkv is None:
        return
    width = attention.num_heads * attention.head_dim
    parts = {"q": width, "k": width, "v": width}
    if getattr(attention, "q_bias", None) is None:
        attention.qkv = SplitLinear(attention.qkv, parts)
        return
    # The native module reads the weights itself, to add a bias that has no part for the keys.
    biases = [attention.q_bias, attention.k_bias, attention.v_bias]
    fused = FusedWeights(attention.qkv.weight, biases, separate=attention.qkv_bias_separate)
    attention.qkv = SplitLinear(fused, parts, called=False)
    attention.q_bias = attention.k_bias = attention.v_bias = None


def _split_mlp(mlp: Any) -> None:
    if type(mlp).__name__ != "GluMlp":
        return
    half = mlp.fc1.out_features // 2
    order = ("in", "gate") if mlp.gate_last else ("gate", "in")
    mlp.fc1 = SplitLinear(mlp.fc1, dict.fromkeys(order, half))


def _mlp_paths(mlp: Any) -> dict[str, str | None]:
    if hasattr(mlp, "fc1_g"):
        return {"mlp_in": "fc1_x", "mlp_gate": "fc1_g", "mlp_out": "fc2"}
    if isinstance(mlp.fc1, SplitLinear):
        return {"mlp_in": "fc1.in", "mlp_gate": "fc1.gate", "mlp_out": "fc2"}
    return {"mlp_in": "fc1", "mlp_gate": None, "mlp_out": "fc2"}


def _scales(block: Any) -> tuple[str | None, str | None]:
    """Return the paths of the LayerScales behind attention and MLP."""
    found: list[str | None] = []
    for number in (1, 2):
        if isinstance(getattr(block, f"drop_path{number}"), Scaled):
            found.append(f"drop_path{number}.scale")
        elif not isinstance(getattr(block, f"ls{number}", nn.Identity()), nn.Identity):
            found.append(f"ls{number}")
        else:
            found.append(None)
    return found[0], found[1]


def _first_module(tower: Any, prefix: str, *names: str) -> str | None:
    for name in names:
        if not isinstance(getattr(tower, name), nn.Identity):
            return prefix + name
    return None
