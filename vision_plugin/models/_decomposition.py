"""The parts of image embeddings, and views of them by layer, head and token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.models._tokens import TokenLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vision_plugin._rich import Table

SCHEMA = "vision_plugin.decomposition/1"


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Image embeddings as exact sums; ``VisionBridge.decompose`` makes it.

    The parts of an image are vectors in the space of the embedding, or, with ``onto``, their inner
    products with directions. They add up: ``embed + by_layer().sum(1) + bias``, and ``pool_mlp``
    and ``hooks`` where there are any, is :meth:`total`.

    Attributes:
        embed: What enters the first block: patches or class token, with positions.
        attention: Contributions of the attention without its biases, ``[b, layers, ..., d]``. The
            axes in between are heads and then tokens, as far as they were asked for. Tokens are
            those that the class token attends to.
        attention_bias: Biases between the heads and the residual stream (of the output projection,
            of a normalisation behind it). The bias of the values counts as the values'.
        mlp: Contribution of each layer's MLP, bias included.
        bias: The last normalisation's bias and those of a pool and the projection.
        pool: Where several tokens are read: their contributions, ``[b, pool heads, tokens, d]`` for
            an attention pool, ``[b, tokens, d]`` for a mean or without ``heads``. These are the
            same vectors as those of embedding and layers, cut in another way: by the token that
            carries them at the end, whichever layer wrote them. None for a class token, or where no
            tokens were asked for.
        pool_mlp: The MLP of an attention pool, a function of the pooled vector that no token or
            layer has a share in; None without one.
        hooks: What hooks, edits and spliced SAEs on the model changed; None without them.
        has_heads: Whether ``attention`` keeps the heads apart.
        has_tokens: Whether ``attention`` keeps the tokens apart.
        layout: Order of the tokens.
        read: Kind of the tokens that the result is read from: ``cls``, ``patch`` or ``all``.
        model_name: Name of the model.
        is_onto: Whether ``d`` counts directions that the parts were multiplied by.

    Examples:
        >>> parts = model.decompose(pixels)
        >>> torch.allclose(parts.total(), model.encode_image(pixels, normalize=False), atol=1e-4)
        True
        >>> parts.by_head().shape
        torch.Size([8, 4, 4, 64])
    """

    embed: Float[Tensor, "b d"]
    attention: Float[Tensor, "b layers *axes d"]
    attention_bias: Float[Tensor, "b layers d"]
    mlp: Float[Tensor, "b layers d"]
    bias: Float[Tensor, "b d"]
    pool: Float[Tensor, "b *pool d"] | None
    pool_mlp: Float[Tensor, "b d"] | None
    hooks: Float[Tensor, "b d"] | None
    has_heads: bool
    has_tokens: bool
    layout: TokenLayout
    read: str
    model_name: str
    is_onto: bool = False

    def __len__(self) -> int:
        return len(self.embed)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return int(self.mlp.shape[1])

    def total(self) -> Float[Tensor, "b d"]:
        """Return the sum of all parts: the embedding, not normalised."""
        total = self.embed + self.by_layer().sum(1) + self.bias
        for part in (self.pool_mlp, self.hooks):
            total = total if part is None else total + part
        return total

    def by_layer(self) -> Float[Tensor, "b layers d"]:
        """Return what each layer adds: attention, its biases, and MLP."""
        return self.attention_by_layer() + self.attention_bias + self.mlp

    def attention_by_layer(self) -> Float[Tensor, "b layers d"]:
        """Return what each layer's attention adds, without its biases."""
        axes = tuple(range(2, self.attention.ndim - 1))
        return self.attention.sum(axes) if axes else self.attention

    def by_head(self) -> Float[Tensor, "b layers heads d"]:
        """Return what each head adds.

        Raises:
            ValueError: the heads were not kept apart.
        """
        if not self.has_heads:
            raise ValueError("the heads were summed: take decompose(pixels, heads=True)")
        return self.attention.sum(3) if self.has_tokens else self.attention

    def by_token(self) -> Float[Tensor, "b tokens d"]:
        """Return what each token adds.

        For a class token: what all heads of all layers read from each token into it. For a pool:
        what each token carries at the end, through all heads of the pool.

        Raises:
            ValueError: the tokens were not kept apart.
        """
        if self.has_tokens:
            axes = (1, 2) if self.has_heads else (1,)
            return self.attention.sum(axes)
        if self.pool is None:
            raise ValueError("the tokens were summed: take decompose(pixels, tokens=True)")
        return self.pool.sum(1) if self.pool.ndim == 4 else self.pool

    def by_patch(self) -> Float[Tensor, "b rows columns d"]:
        """Return :meth:`by_token` of the patches, on their grid.

        Raises:
            ValueError: the tokens were not kept apart.
        """
        tokens = self.by_token()
        return self.on_grid(tokens, 1)

    def on_grid(self, tokens: Tensor, axis: int) -> Tensor:
        """Return a tensor with its axis of tokens replaced by the two axes of the patch grid."""
        if tokens.shape[axis] != self.layout.n_patches:
            rows = self.layout.indices("patch").to(tokens.device)
            tokens = tokens.index_select(axis, rows)
        on_grid: Tensor = tokens.unflatten(axis, self.layout.grid)
        return on_grid

    def parts(self) -> Iterator[tuple[str, Float[Tensor, "b d"]]]:
        """Yield named parts that add up to :meth:`total`, heads apart where they are kept."""
        yield "embed", self.embed
        for layer in range(self.n_layers):
            if self.has_heads:
                for head, part in enumerate(self.by_head()[:, layer].unbind(1)):
                    yield f"head {layer}.{head}", part
            else:
                yield f"attention {layer}", self.attention_by_layer()[:, layer]
            yield f"attention bias {layer}", self.attention_bias[:, layer]
            yield f"mlp {layer}", self.mlp[:, layer]
        yield "bias", self.bias
        if self.pool_mlp is not None:
            yield "pool mlp", self.pool_mlp
        if self.hooks is not None:
            yield "hooks", self.hooks

    def shares(self) -> dict[str, float]:
        """Return the mean share of each part in the embedding; the shares of all parts sum to 1.

        The share of a part ``p`` in an embedding ``e`` is ``<p, e> / <e, e>``, the part of its
        length that ``p`` gives. It is negative where the part points the other way.

        Raises:
            ValueError: the parts are inner products with directions.
        """
        if self.is_onto:
            raise ValueError("the parts are inner products: shares need decompose without onto=")
        total = self.total().double()
        size = total.square().sum(-1).clamp(min=1e-300)
        return {
            name: float(((part.double() * total).sum(-1) / size).mean())
            for name, part in self.parts()
        }

    @classmethod
    def joined(cls, found: Sequence[Decomposition]) -> Decomposition:
        """Return decompositions of several batches as one.

        Raises:
            ValueError: there is none.
        """
        if not found:
            raise ValueError("there is no decomposition to join: take some images apart first")
        together: dict[str, Any] = {
            name: torch.cat([one.tensors()[name] for one in found]) for name in found[0].tensors()
        }
        return replace(found[0], **together)

    def with_hooks(self, hooks: Float[Tensor, "b d"]) -> Decomposition:
        """Return the decomposition with what hooks changed as one more part."""
        return replace(self, hooks=hooks)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for ``safetensors`` or numpy."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    # ------------------------------------------------------------------ shown

    def table(self) -> Table:
        """Return shares and mean lengths by layer, for ``rich`` to print."""
        from vision_plugin.models._decomposition_shown import table

        return table(self)

    def plot(self) -> Figure:
        """Return a figure: share of attention and MLP by layer, of each head, and of the patches.

        Heads and patches are drawn where they were kept apart.
        """
        from vision_plugin.models._decomposition_shown import plot

        return plot(self)

    def to_dict(self) -> dict[str, Any]:
        """Return shares and mean lengths ready for JSON, without the tensors."""
        shares = self.shares()
        lengths = {name: float(part.norm(dim=-1).mean()) for name, part in self.parts()}
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "model_name": self.model_name,
            "n_images": len(self),
            "read": self.read,
            "length": float(self.total().norm(dim=-1).mean()),
            "parts": [
                {"name": name, "share": share, "length": lengths[name]}
                for name, share in shares.items()
            ],
        }
        if self.has_tokens or self.pool is not None:
            found["patches"] = self.patch_shares().tolist()
        return found

    def patch_shares(self) -> Float[Tensor, "rows columns"]:
        """Return the mean share of each patch in the embedding; see :meth:`shares`."""
        total = self.total()
        share = torch.einsum("brcd,bd->brc", self.by_patch(), total)
        return (share / total.square().sum(-1).clamp(min=1e-30)[:, None, None]).mean(0)
