"""The way from the last residual stream to one vector per image, as a linear map of the stream.

A tower reads its class token, a mean of tokens, or an attention over tokens; a normalisation and
a projection come before or after. An adapter describes this as a :class:`Readout`. With the
statistics of the normalisations and the weights of the attention held at their values for an image,
the vector is linear in the stream,

    embedding = sum_g sum_q w[g, q] (stream[q] @ R[g]) + bias + rest,

with one ``g`` for each head of an attention pool, and one ``g`` in all other towers. The ``rest``
is the MLP of an attention pool, which acts on the pooled vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Frozen:
    """A normalisation or a scale with its statistics held: ``inv * centre(x) * weight + bias``."""

    inv: Float[Tensor, "*rows 1"] | None = None
    """One divided by the standard deviation of each row; None stands for 1."""
    weight: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " d"] | None = None
    is_centred: bool = False

    def linear(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        """Return ``x`` centred and times the weight, without ``inv`` and without the bias."""
        if self.is_centred:
            x = x - x.mean(-1, keepdim=True)
        return x if self.weight is None else x * self.weight

    def scaled(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Return the linear part of the rows that the statistics were taken of."""
        y = self.linear(x)
        return y if self.inv is None else y * self.inv

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Return what the module computes for the rows that the statistics were taken of."""
        y = self.scaled(x)
        return y if self.bias is None else y + self.bias


def frozen(module: Any, x: Float[Tensor, "*rows d"]) -> Frozen:
    """Return a normalisation or LayerScale with the statistics of ``x`` held.

    Args:
        module: LayerNorm or RMSNorm of any library, a LayerScale, an identity, or None.
        x: Input of the module.
    """
    if module is None or isinstance(module, nn.Identity):
        return Frozen()
    eps = getattr(module, "eps", None)
    if eps is None or "scale" in type(module).__name__.lower():
        ones = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
        return Frozen(weight=_as(module(ones.to(_dtype(module, x))), x))
    name = type(module).__name__.lower()
    is_centred = not ("rms" in name or "simplenorm" in name)
    centred = x - x.mean(-1, keepdim=True) if is_centred else x
    inv = (centred.square().mean(-1, keepdim=True) + float(eps)).rsqrt()
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return Frozen(
        inv,
        None if weight is None else _as(weight, x),
        None if bias is None else _as(bias, x),
        is_centred,
    )


@dataclass(frozen=True, eq=False)
class AttentionPool:
    """One learnt query that attends to the tokens, in ``g`` heads of width ``e``."""

    query: Float[Tensor, "g e"]
    """Query as it enters the scores, scaled."""
    key_weight: Float[Tensor, "d g_e"]
    key_bias: Float[Tensor, " g_e"] | None
    value_weight: Float[Tensor, "d g_e"]
    value_bias: Float[Tensor, " g_e"] | None
    out_weight: Float[Tensor, "g_e d_pooled"]
    out_bias: Float[Tensor, " d_pooled"] | None
    key_norm: Any = None
    """Normalisation of each head's keys, or None."""
    mlp: Callable[[Tensor], Tensor] | None = None
    """What is added to the pooled vector, as a function of it; None adds nothing."""

    @classmethod
    def of_torch(
        cls,
        attention: nn.MultiheadAttention,
        query: Float[Tensor, " d"],
        *,
        mlp: Callable[[Tensor], Tensor] | None = None,
    ) -> AttentionPool:
        """Return the pool of a ``nn.MultiheadAttention`` with one query, not yet projected."""
        width, heads = attention.embed_dim, attention.num_heads
        fused_weight: Tensor | None = attention.in_proj_weight
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        q, k, v = (
            (getattr(attention, name).detach() for name in names)
            if fused_weight is None
            else fused_weight.detach().split(width)
        )
        fused = attention.in_proj_bias
        biases = [None] * 3 if fused is None else list(fused.detach().split(width))
        projected = nn.functional.linear(query.detach(), q, biases[0]).view(heads, -1)
        out = attention.out_proj
        return cls(
            projected * projected.shape[-1] ** -0.5,
            k.T,
            biases[1],
            v.T,
            biases[2],
            out.weight.detach().T,
            None if out.bias is None else out.bias.detach(),
            mlp=mlp,
        )

    def to(self, x: Tensor) -> AttentionPool:
        """Return the pool in the precision and on the device of a tensor."""
        moved: dict[str, Any] = {
            name: _as(value, x) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def weights(self, y: Float[Tensor, "b q d"]) -> Float[Tensor, "b g q"]:
        """Return each head's attention to the tokens."""
        keys = y @ self.key_weight
        if self.key_bias is not None:
            keys = keys + self.key_bias
        keys = keys.unflatten(-1, self.query.shape)
        if self.key_norm is not None and not isinstance(self.key_norm, nn.Identity):
            keys = frozen(self.key_norm, keys)(keys)
        return torch.einsum("ge,bqge->bgq", self.query, keys).softmax(-1)


@dataclass(frozen=True, eq=False)
class Readout:
    """What a tower does behind its last block, in this order."""

    tokens: str = "cls"
    """Kind of the tokens that are read, ``"cls"`` (the first one), ``"patch"`` or ``"all"``."""
    norm: Any = None
    """Normalisation of each token, or None."""
    pool: AttentionPool | None = None
    """Attention over the tokens; None takes their mean."""
    norm_after: Any = None
    """Normalisation of the one vector, or None."""
    projections: tuple[Any, ...] = ()
    """Linear maps, one after the other."""

    def rows(self, layout: Any) -> Int[Tensor, " q"]:
        """Return the places of the tokens that are read, for a TokenLayout."""
        rows: Tensor = layout.indices(self.tokens)
        return rows[:1] if self.tokens == "cls" else rows

    def of(
        self,
        stream: Float[Tensor, "b q d"],
        onto: Float[Tensor, "d_embed c"] | None = None,
    ) -> LinearReadout:
        """Return the linear map for images.

        Args:
            stream: The last residual stream at the tokens that are read.
            onto: Directions in the space of the result, as columns; the map then leads to the
                inner products with them.
        """
        norm = frozen(self.norm, stream)
        pool = None if self.pool is None else self.pool.to(stream)
        n_read = stream.shape[1]
        if pool is None:
            weights = stream.new_full((len(stream), 1, n_read), 1 / n_read)
            maps = norm.linear(torch.eye(stream.shape[-1]).to(stream))[None]
            bias = stream.new_zeros(stream.shape[-1]) if norm.bias is None else norm.bias
            after: Callable[[Tensor], Tensor] | None = None
        else:
            weights = pool.weights(norm(stream))
            maps, bias = _pool_maps(pool, norm)
            after = pool.mlp
        if norm.inv is not None:
            weights = weights * norm.inv[..., 0][:, None]
        found = LinearReadout(weights, maps, bias.expand(len(stream), -1), None)
        if after is not None:
            pooled = found(stream)
            found = replace(found, rest=_as(after(pooled), stream))
        found = found.behind(frozen(self.norm_after, found(stream)))
        for projection in self.projections:
            bias_out = getattr(projection, "bias", None)
            found = found.mapped(
                _as(projection.weight, stream).T,
                None if bias_out is None else _as(bias_out, stream),
            )
        return found if onto is None else found.mapped(_as(onto, stream))


@dataclass(frozen=True, eq=False)
class LinearReadout:
    """A readout of some images with everything held that is not linear; see the module."""

    weights: Float[Tensor, "b g q"]
    maps: Float[Tensor, "g d d_embed"]
    bias: Float[Tensor, "b d_embed"]
    rest: Float[Tensor, "b d_embed"] | None

    def part(self, stream: Float[Tensor, "b q d"]) -> Float[Tensor, "b d_embed"]:
        """Return the contribution of one summand of the stream."""
        # Plain products: einsum would copy the maps, which are many numbers, at each call.
        return torch.bmm(self.weights, stream).flatten(1) @ self.maps.flatten(0, 1)

    def by_token(self, stream: Float[Tensor, "b q d"]) -> Float[Tensor, "b g q d_embed"]:
        """Return the contribution of each token of the stream through each head of the pool."""
        return self.weights[..., None] * torch.einsum("bqd,gdk->bgqk", stream, self.maps)

    def __call__(self, stream: Float[Tensor, "b q d"]) -> Float[Tensor, "b d_embed"]:
        """Return the vectors of images whose stream the statistics were taken of."""
        total = self.part(stream) + self.bias
        return total if self.rest is None else total + self.rest

    def behind(self, norm: Frozen) -> LinearReadout:
        """Return the readout with a normalisation of its result."""
        inv = self.bias.new_ones(len(self.bias), 1) if norm.inv is None else norm.inv
        bias = norm.linear(self.bias) * inv
        return LinearReadout(
            self.weights * inv[..., None],
            norm.linear(self.maps),
            bias if norm.bias is None else bias + norm.bias,
            None if self.rest is None else norm.linear(self.rest) * inv,
        )

    def mapped(
        self, matrix: Float[Tensor, "d_embed k"], bias: Float[Tensor, " k"] | None = None
    ) -> LinearReadout:
        """Return the readout with a linear map of its result."""
        moved = self.bias @ matrix
        return LinearReadout(
            self.weights,
            self.maps @ matrix,
            moved if bias is None else moved + bias,
            None if self.rest is None else self.rest @ matrix,
        )


def _pool_maps(pool: AttentionPool, norm: Frozen) -> tuple[Tensor, Tensor]:
    """Return the map of each head from stream to pooled vector, and what no token contributes."""
    shape = pool.query.shape
    values = norm.linear(torch.eye(pool.value_weight.shape[0]).to(pool.query)) @ pool.value_weight
    out = pool.out_weight.unflatten(0, shape)
    maps = torch.einsum("dge,gek->gdk", values.unflatten(-1, shape), out)
    bias = pool.out_weight.new_zeros(pool.out_weight.shape[1])
    if pool.out_bias is not None:
        bias = bias + pool.out_bias
    if pool.value_bias is not None:
        bias = bias + pool.value_bias @ pool.out_weight
    if norm.bias is not None:
        bias = bias + norm.bias @ pool.value_weight @ pool.out_weight
    return maps.contiguous(), bias


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(device=like.device, dtype=like.dtype)


def _dtype(module: Any, x: Tensor) -> torch.dtype:
    parameter = next(iter(module.parameters()), None) if isinstance(module, nn.Module) else None
    return x.dtype if parameter is None else parameter.dtype
