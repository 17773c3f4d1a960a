"""What the heads of a block write, as a linear map of their values.

A head's output is ``pattern @ values`` through its part of the output projection. Some families
normalise, scale or gate the heads before that projection, or normalise or scale the output after
it; with the statistics held, all of it is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.models.readout import Frozen, LinearReadout, frozen


@dataclass(frozen=True, eq=False)
class Gain:
    """What a family does to the joined heads before the output projection: ``z * scale + bias``."""

    scale: Float[Tensor, "*rows h_e"]
    bias: Float[Tensor, "*rows h_e"] | None = None

    @classmethod
    def of(
        cls,
        norm: Any,
        seen: Float[Tensor, "b q h_e"] | None,
        *,
        before: Float[Tensor, " h_e"] | None = None,
        after: Float[Tensor, "b q h_e"] | None = None,
    ) -> Gain | None:
        """Return the gain of a scale, a normalisation and a gate; None if there is none of them.

        Args:
            norm: Normalisation of the joined heads, or None.
            seen: Input of the normalisation.
            before: Factor on the heads before the normalisation.
            after: Factor behind it.
        """
        scale, bias = before, None
        if norm is not None:
            assert seen is not None
            held = frozen(norm, seen)
            mean = seen.mean(-1, keepdim=True) if held.is_centred else torch.zeros_like(seen)
            ones = torch.ones_like(seen) if held.inv is None else held.inv.expand_as(seen)
            factor = ones if held.weight is None else ones * held.weight
            bias = -mean * factor if held.bias is None else held.bias - mean * factor
            scale = factor if before is None else factor * before
        if after is not None:
            scale = after if scale is None else scale * after
            bias = None if bias is None else bias * after
        return None if scale is None else cls(scale, bias)


@dataclass(frozen=True, eq=False)
class HeadWriter:
    """The output projection of a block's heads and what comes behind it, at some tokens.

    Attributes:
        out: Output matrix of each head.
        out_bias: Bias of the output projection, or None.
        post: LayerScale or normalisation of the attention's output, statistics held.
    """

    out: Float[Tensor, "h e d_model"]
    out_bias: Float[Tensor, " d_model"] | None
    post: Frozen

    @classmethod
    def of(cls, model: Any, block: int, output: Float[Tensor, "b q d_model"]) -> HeadWriter:
        """Return the writer of a block.

        Args:
            model: A VisionBridge.
            block: Number of the block.
            output: ``blocks.N.attn.hook_out`` at the tokens.
        """
        attention = model.blocks[block].attn
        linear = attention.o.original_component
        weight = linear.weight.detach().to(output)
        bias = None if linear.bias is None else linear.bias.detach().to(output)
        post = getattr(model.blocks[block], "ln1_post", None)
        native = None if post is None else post.original_component
        out = weight.T.unflatten(0, (-1, int(model.cfg.d_head)))
        return cls(out, bias, frozen(native, output))

    def weights(self, readout: LinearReadout) -> Float[Tensor, "b g q"]:
        """Return the readout's weights of the tokens, times what scales each token here."""
        if self.post.inv is None:
            return readout.weights
        return readout.weights * self.post.inv[..., 0][:, None]

    def maps(self, readout: LinearReadout) -> Float[Tensor, "h e d_embed"]:
        """Return the map of each head's output to the result, for a readout without a pool."""
        written = self.post.linear(self.out)
        moved = written.flatten(0, 1) @ readout.maps[0]
        return moved.view(*self.out.shape[:2], moved.shape[-1])

    def bias_part(self, readout: LinearReadout, gain: Gain | None) -> Float[Tensor, "b d_embed"]:
        """Return the contribution of all biases between the heads and the residual stream."""
        n, n_rows = readout.weights.shape[0], readout.weights.shape[2]
        width = self.out.shape[-1]
        constant = self.out.new_zeros(n, n_rows, width)
        if self.out_bias is not None:
            constant = constant + self.out_bias
        if gain is not None and gain.bias is not None:
            constant = constant + gain.bias @ self.out.flatten(0, 1)
        constant = self.post.scaled(constant)
        if self.post.bias is not None:
            constant = constant + self.post.bias
        return readout.part(constant)

    def by_head(
        self, readout: LinearReadout, z: Float[Tensor, "b q h e"], *, heads: bool
    ) -> Float[Tensor, "b *h d_embed"]:
        """Return the contribution of each head, or of all together.

        Args:
            readout: The readout.
            z: Output of each head before the projection, without the gain's bias.
            heads: Whether to keep the heads apart.
        """
        joined = torch.einsum("bgq,bqhe->bghe", self.weights(readout), z)
        if readout.maps.shape[0] == 1:
            maps = self.maps(readout)
            if not heads:
                return joined[:, 0].flatten(1) @ maps.flatten(0, 1)
            return torch.einsum("bhe,hek->bhk", joined[:, 0], maps)
        if not heads:
            written = self.post.linear(joined.flatten(2) @ self.out.flatten(0, 1))
            return written.flatten(1) @ readout.maps.flatten(0, 1)
        written = self.post.linear(torch.einsum("bghe,hed->bghd", joined, self.out))
        return written.transpose(1, 2).flatten(2) @ readout.maps.flatten(0, 1)

    def by_token(
        self,
        readout: LinearReadout,
        pattern: Float[Tensor, "b h n"],
        values: Float[Tensor, "b n h e"],
        gain: Gain | None,
        *,
        heads: bool,
    ) -> Float[Tensor, "b *h n d_embed"]:
        """Return the contribution of each token that the heads of the class token attend to.

        Args:
            readout: A readout of one token.
            pattern: Attention of that token.
            values: Values of all tokens.
            gain: What happens before the projection, or None.
            heads: Whether to keep the heads apart.
        """
        if gain is not None:
            scale = gain.scale if gain.scale.ndim == 1 else gain.scale[:, 0, None]
            values = values * scale.unflatten(-1, self.out.shape[:2])
        weight = pattern * self.weights(readout)[:, 0, :, None]
        seen = values.transpose(1, 2) * weight[..., None]  # [b, h, n, e]
        maps = self.maps(readout)
        if heads:
            return torch.matmul(seen, maps)
        return seen.transpose(1, 2).flatten(2) @ maps.flatten(0, 1)


def values_by_head(values: Tensor, n_heads: int, d_head: int) -> Float[Tensor, "b n h e"]:
    """Return ``hook_v`` by head, shared values once for each head that reads them."""
    split: Tensor = values.flatten(2).unflatten(-1, (-1, d_head))
    return split.repeat_interleave(n_heads // split.shape[2], dim=2)
