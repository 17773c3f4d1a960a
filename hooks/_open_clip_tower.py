"""open_clip's own ``VisionTransformer`` as a tower: sizes, parts, attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vision_plugin.hooks._adapter import Dimensions, Paths
from vision_plugin.hooks._components import VisionAttentionBridge
from vision_plugin.hooks._restructure import (
    FusedWeights,
    MatrixProduct,
    SplitLinear,
    tap_positions,
)
from vision_plugin.models import UnsupportedModelError
from vision_plugin.models.heads import Gain
from vision_plugin.models.readout import AttentionPool, Readout


class OpenClipAttentionBridge(VisionAttentionBridge):
    """``nn.MultiheadAttention`` or open_clip's ``Attention``.

    Both compute everything from bare weights in one call. That call runs as it is, unless a hook
    inside it is live. Then this class computes the attention, equal up to rounding.
    """

    def native_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native attention between ``hook_in`` and ``hook_out``."""
        native: Any = self.original_component
        hidden = self.hook_in(args[0])
        if isinstance(native, nn.MultiheadAttention):
            return self.pack(self.hook_out(native(hidden, hidden, hidden, **kwargs)[0]))
        return self.hook_out(native(hidden, **kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native attention, or the explicit one if a hook needs it."""
        if not self.explicit_needed():
            return self.native_forward(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        output = self.attend(self.hook_in(args[0]), attention_mask=mask)
        return self.pack(self.hook_out(output))

    def pack(self, output: Tensor) -> Any:
        """Return what ``nn.MultiheadAttention`` returns: the output and absent weights."""
        is_torch = isinstance(self.original_component, nn.MultiheadAttention)
        return (output, None) if is_torch else output

    def watched_hooks(self) -> list[HookPoint]:
        """Return the hook points inside too, as the native call shows none of them."""
        inside = [getattr(part, side) for part in self._parts() for side in ("hook_in", "hook_out")]
        return [*super().watched_hooks(), *inside]

    def _parts(self) -> list[Any]:
        return [self.q, self.k, self.v, self.o]

    def project(self, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, normalised if the block does that."""
        del kwargs
        native: Any = self.original_component
        q, k, v = (self.split_heads(part) for part in native.qkv(hidden).chunk(3, dim=-1))
        if isinstance(native, nn.MultiheadAttention):
            return q, k, v
        return native.ln_q(q), native.ln_k(k), v

    def combine(self, z: Tensor, hidden: Tensor) -> Tensor:
        """Scale and join the heads, and normalise them if the block does that."""
        native: Any = self.original_component
        if isinstance(native, nn.MultiheadAttention):
            return super().combine(z, hidden)
        if native.head_scale is not None:
            z = z * native.head_scale
        joined: Tensor = native.ln_inner(super().combine(z, hidden))
        return joined

    @property
    def inner_norm(self) -> Any:
        """open_clip's norm of the joined heads."""
        norm = getattr(self.original_component, "ln_inner", None)
        return None if norm is None or isinstance(norm, nn.Identity) else norm

    def gain(self, seen: Tensor | None, hidden: Tensor) -> Gain | None:
        """Return the norm's factors and the heads' scales."""
        scale = getattr(self.original_component, "head_scale", None)
        before = None
        if scale is not None:
            before = scale.detach().to(hidden).flatten().repeat_interleave(int(self.config.d_head))
        return Gain.of(self.inner_norm, seen, before=before)


def readout(tower: Any, projections: tuple[Any, ...]) -> Readout:
    """Return the way from the last residual stream to the embedding.

    Args:
        tower: The tower.
        projections: The joint projection, or nothing.

    Raises:
        UnsupportedModelError: the head cannot be taken apart.
    """
    tokens = {"tok": "cls", "avg": "patch"}.get(tower.pool_type)
    pool = tower.attn_pool
    if tokens is None or (pool is not None and tokens != "cls"):
        raise UnsupportedModelError(
            f"its pool {tower.pool_type!r} cannot be taken apart: supported are 'tok', 'avg', and "
            "an attention pool whose first query is the result"
        )
    if pool is None:
        before, after = tower.ln_post, None
        if tower.final_ln_after_pool:
            before, after = after, before
        return Readout(tokens, before, None, after, projections)
    if tower.attn_pool_contrastive is not None:
        raise UnsupportedModelError("its two attention pools cannot be taken apart")
    query = pool.ln_q(pool.query)[0]
    return Readout(
        "all", pool.ln_k, AttentionPool.of_torch(pool.attn, query), tower.ln_post, projections
    )


def check(tower: Any) -> None:
    """Raise for a part that cannot run natively or has no attention pattern.

    Raises:
        UnsupportedModelError: the message names the part.
    """
    block = tower.transformer.resblocks[0]
    kind = type(block).__name__
    if kind not in ("ResidualAttentionBlock", "CustomResidualAttentionBlock"):
        raise UnsupportedModelError(
            f"its blocks are {kind}; supported are ResidualAttentionBlock and "
            "CustomResidualAttentionBlock"
        )
    if getattr(block.attn, "logit_scale", None) is not None:
        raise UnsupportedModelError(
            "its scaled cosine attention is not supported: open_clip's own forward fails on it"
        )


def dimensions(tower: Any) -> Dimensions:
    """Return the sizes of an open_clip tower.

    Raises:
        UnsupportedModelError: a part is of an unsupported kind.
    """
    check(tower)
    block = tower.transformer.resblocks[0]
    return Dimensions(
        d_model=tower.transformer.width,
        n_heads=block.attn.num_heads,
        n_layers=len(tower.transformer.resblocks),
        d_mlp=block.mlp.c_proj.in_features,
        image_size=tuple(tower.image_size),
        patch_size=tuple(tower.patch_size),
        eps=float(block.ln_1.eps),
        act_fn=type(block.mlp.gelu).__name__.lower(),
    )


def paths(tower: Any, prefix: str = "") -> Paths:
    """Return the parts of an open_clip tower after :func:`restructure`."""
    block = tower.transformer.resblocks[0]
    has_norm = not isinstance(tower.ln_pre, nn.Identity)
    return Paths(
        embed=prefix + ("patch_dropout" if has_norm else "ln_pre"),
        embed_ln=f"{prefix}ln_pre" if has_norm else None,
        pos_embed=f"{prefix}position_tap",
        blocks=f"{prefix}transformer.resblocks",
        ln1="ln_1",
        attn="attn",
        q="qkv.q",
        k="qkv.k",
        v="qkv.v",
        o="out_proj",
        ln1_post=_last_module(block, "ln_attn", "ls_1"),
        ln2="ln_2",
        mlp="mlp",
        mlp_in="c_fc",
        mlp_out="c_proj",
        ln2_post=_last_module(block, "ls_2"),
        ln_final=f"{prefix}ln_post",
        unembed=f"{prefix}product" if isinstance(tower.proj, nn.Parameter) else None,
    )


def restructure(tower: Any) -> None:
    """Turn the projections, the positions and the joint projection into modules."""
    for block in tower.transformer.resblocks:
        attention = block.attn
        width = attention.in_proj_weight.shape[0] // 3
        biases = [] if attention.in_proj_bias is None else [attention.in_proj_bias]
        fused = FusedWeights(attention.in_proj_weight, biases)
        parts = {"q": width, "k": width, "v": width}
        attention.qkv = SplitLinear(fused, parts, called=False)
    tap_positions(tower, "positional_embedding", "_embeds")
    if tower.proj is not None:
        tower.product = MatrixProduct(tower.proj)


def project_and_pool(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the native forward: return image embedding, last residual stream and pooled output."""
    hidden = tower.transformer(tower._embeds(pixels))
    pooled, _ = tower._pool(hidden)
    embedding = tower.product(pooled) if tower.proj is not None else pooled
    return embedding, hidden, pooled


def _last_module(block: Any, *names: str) -> str | None:
    found = [n for n in names if not isinstance(getattr(block, n, nn.Identity()), nn.Identity)]
    return found[-1] if found else None
