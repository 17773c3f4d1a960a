r"""The second-order effect of neurons and latents: what later heads make of what they write.

Gandelsman, Efros and Steinhardt, Interpreting the second-order effects of neurons in CLIP (ICLR
2025, arXiv 2406.04341). A neuron of an early MLP hardly writes into the class token itself; it
writes into all tokens, and the heads of later layers read it from there. With attention and the
statistics of the normalisations held, the effect of component ``k`` with direction ``w_k`` on an
image is

    phi_k = sum_{l' > l} sum_h  a[l', h, k]  M[l', h](w_k),
    a[l', h, k] = sum_tok  A[l', h](cls, tok) act_k(tok) / sigma[l', tok],

``M`` being the normalisation's weight, the head's values and output, the last normalisation and the
projection. So the effects of one component on all images have rank (later layers x heads) at most,
and only the ``a`` have to be kept of an image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.lens._texts import check_head
from vision_plugin.models import UnsupportedModelError
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.heads import HeadWriter
from vision_plugin.models.readout import Frozen, LinearReadout, Readout, frozen
from vision_plugin.models.site import Site, hooked, in_eval_mode
from vision_plugin.steering import LatentEditor


class Writers:
    """Components that write into the residual stream: neurons of an MLP, or latents of an SAE.

    Args:
        model: A VisionBridge.
        source: Number of a layer, whose MLP's neurons are meant, or an SAE at the residual stream
            or at the output of an MLP or an attention.
        which: Numbers of the neurons or latents; None takes all.

    Attributes:
        name: What they are, for people.
        hook_name: Hook that shows the neurons, or that the SAE reads.
        which: Numbers of the components.
        first_reader: First layer whose heads read what they write.

    Raises:
        ValueError: there is no such layer or component, or no later head reads it.
    """

    def __init__(
        self, model: Any, source: int | Dictionary, which: Sequence[int] | None = None
    ) -> None:
        self._site: Site | None = None
        self._editor: LatentEditor | None = None
        if isinstance(source, int):
            check_head(model, source, 0)
            self.name, size = f"the neurons of layer {source}", int(model.cfg.d_mlp)
            self.hook_name, self.first_reader = f"blocks.{source}.mlp.hook_post", source + 1
        else:
            self._site = Site.of(model, source)
            self._editor = LatentEditor(source)
            self.hook_name, writes = self._site.hook_name, self._site.hook_name_out
            self.name, size = f"the latents at {writes}", int(source.cfg.d_sae)
            self.first_reader = _first_reader(writes)
        if self.first_reader >= int(model.cfg.n_layers):
            raise ValueError(
                f"no head comes after {self.name}, so they have no second-order effect: take an "
                "earlier layer"
            )
        self.which = tuple(range(size)) if which is None else tuple(int(k) for k in which)
        wrong = [k for k in self.which if not 0 <= k < size]
        if wrong or not self.which:
            raise ValueError(
                f"which= names {wrong[0] if wrong else 'nothing'}, but {self.name} are 0 to "
                f"{size - 1}"
            )
        self._layer = source if isinstance(source, int) else -1
        self._model = model

    def read(self, seen: Tensor) -> tuple[Float[Tensor, "b t k"], Float[Tensor, "k d_model"]]:
        """Return activations at all tokens, and what one unit of each component writes.

        Args:
            seen: What the hook showed.

        Raises:
            ValueError: the SAE's decoder is not linear in its latents.
        """
        chosen = torch.tensor(self.which, device=seen.device)
        if self._site is None or self._editor is None:
            return seen[..., chosen], self._neurons(seen)[chosen]
        reading = self._site.read({self._site.hook_name: seen, self._site.hook_name_out: seen})
        found = self._editor.read(reading.source)
        if self._editor.directions is None:
            raise ValueError(
                "this SAE's decoder is not linear in its latents, so a latent has no direction to "
                "follow"
            )
        values = found.values(chosen)
        values = values if found.gain is None else values * found.gain
        n_tokens = seen.shape[1]
        whole = values.new_zeros(len(values), n_tokens, len(self.which))
        places = reading.rows.to(values.device)[..., None].expand(-1, -1, len(self.which))
        return whole.scatter(1, places, values), self._editor.directions[chosen]

    def _neurons(self, like: Tensor) -> Float[Tensor, "n d_model"]:
        block = self._model.blocks[self._layer]
        rows = block.mlp.out.original_component.weight.detach().T.to(like)
        post = getattr(block, "ln2_post", None)
        return rows if post is None else frozen(post.original_component, rows).linear(rows)


@dataclass(frozen=True, eq=False)
class Passage:
    """The way of components through later heads, for some images.

    Attributes:
        amounts: ``a`` of the module's formula, layers and heads on one axis.
        maps: Where each component leads through each layer and head.
    """

    amounts: Float[Tensor, "b k r"]
    maps: Float[Tensor, "k r d"]

    def effects(self) -> Float[Tensor, "b k d"]:
        """Return the effect of each component on each image."""
        return torch.einsum("bkr,krd->bkd", self.amounts, self.maps)


@torch.no_grad()
def passage(model: Any, pixels: Tensor, writers: Writers, *, maps: Tensor | None = None) -> Passage:
    """Run images and return the way of components through later heads.

    Args:
        model: A VisionBridge with a class token whose blocks normalise before their heads.
        pixels: Images, ``[b, channels, height, width]``.
        writers: The components.
        maps: Maps of an earlier call with the same model and components.

    Raises:
        UnsupportedModelError: the tower reads more than a class token, or its heads are not linear
            maps of a normalised stream.
    """
    readout: Readout = model.adapter.readout(model)
    n_layers = int(model.cfg.n_layers)
    later = range(writers.first_reader, n_layers)
    last = f"blocks.{n_layers - 1}.hook_resid_post"
    names = [writers.hook_name, last]
    for layer in later:
        names += [f"blocks.{layer}.{at}" for at in ("hook_resid_pre", "attn.hook_pattern")]
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(activation: Tensor, hook: Any) -> None:
            del hook
            seen[name] = activation.detach().clone()

        return keep

    _check(model, readout)
    with in_eval_mode(model), hooked(model, {name: keeper(name) for name in names}):
        model.image_features(pixels, normalize=False)
    exact = torch.promote_types(seen[last].dtype, torch.float32)
    acts, directions = writers.read(seen[writers.hook_name])
    acts, directions = acts.to(exact), directions.to(exact)
    linear = readout.of(seen[last][:, :1].to(exact))
    amounts, ways = [], []
    for layer in later:
        stream = seen[f"blocks.{layer}.hook_resid_pre"].to(exact)
        norm = frozen(model.blocks[layer].ln1.original_component, stream)
        weight = seen[f"blocks.{layer}.attn.hook_pattern"][:, :, 0].to(exact)
        if norm.inv is not None:
            weight = weight * norm.inv[..., 0][:, None]
        amount = torch.einsum("bht,btk->bkh", weight, acts)
        amounts.append(amount * linear.weights[:, 0, 0, None, None])
        if maps is None:
            ways.append(_way(model, layer, directions, norm, linear))
    if maps is None:
        maps = torch.cat(ways, 1)
    return Passage(torch.stack(amounts, 2).flatten(2), maps)


def second_order_effects(
    model: Any, pixels: Tensor, source: int | Dictionary, *, which: Sequence[int] | None = None
) -> Float[Tensor, "b k d_embed"]:
    """Return the second-order effect of each component on each image's embedding, not normalised.

    Args:
        model: A VisionBridge with a class token.
        pixels: Images, ``[b, channels, height, width]``.
        source: Number of a layer, whose MLP's neurons are meant, or an SAE.
        which: Numbers of the neurons or latents; None takes all.

    Raises:
        UnsupportedModelError: the tower has no such heads.
        ValueError: there is no such layer or component, or no later head reads it.

    Examples:
        >>> vp.lens.second_order_effects(model, pixels, 1, which=[0, 1]).shape
        torch.Size([8, 2, 64])
    """
    return passage(model, pixels, Writers(model, source, which)).effects()


def _way(
    model: Any, layer: int, directions: Tensor, norm: Frozen, linear: LinearReadout
) -> Float[Tensor, "k h d"]:
    """Return where directions in the stream lead through each head of a layer."""
    attention = model.blocks[layer].attn
    n_heads, d_head = int(model.cfg.n_heads), int(model.cfg.d_head)
    values = attention.v.original_component.weight.detach().to(directions)
    values = values.unflatten(0, (-1, d_head))
    values = values.repeat_interleave(n_heads // len(values), dim=0)
    writer = HeadWriter.of(model, layer, linear.maps.new_zeros(1, 1, linear.maps.shape[1]))
    read = torch.einsum("kd,hed->khe", norm.linear(directions), values)
    return torch.einsum("khe,hex->khx", read, writer.maps(linear))


def _first_reader(hook_name: str) -> int:
    """Return the first layer whose heads read what is written at a hook.

    Raises:
        ValueError: the hook is no place of the residual stream.
    """
    places = r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)"
    found = re.fullmatch(places, hook_name)
    if found is None:
        raise ValueError(
            f"the second-order lens follows what is written into the residual stream, and "
            f"{hook_name} is none of its hooks: take an SAE at hook_resid_post or hook_mlp_out"
        )
    return int(found.group(1)) + (found.group(2) != "resid_pre")


def _check(model: Any, readout: Readout) -> None:
    name = model.cfg.model_name
    if readout.pool is not None or readout.tokens != "cls":
        raise UnsupportedModelError(
            f"{name} has no class token that becomes the embedding, so the second-order lens does "
            "not apply: it follows what heads read into that token"
        )
    hidden = torch.zeros(1, 1, int(model.cfg.d_model), device=model.device, dtype=model.dtype)
    for block in model.blocks:
        post = getattr(block, "ln1_post", None)
        held = frozen(None if post is None else post.original_component, hidden)
        is_plain = block.attn.inner_norm is None and block.attn.gain(None, hidden) is None
        if getattr(block, "ln1", None) is None or held.inv is not None or not is_plain:
            raise UnsupportedModelError(
                f"{name} normalises or gates what its heads write, which the second-order lens "
                "does not follow"
            )
