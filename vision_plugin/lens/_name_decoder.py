"""Decoder directions in the text space: what a latent adds to the image embedding."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision_plugin.models.dictionary import Dictionary, d_out
from vision_plugin.models.site import Site, in_eval_mode

EXACT = "exact: the SAE reconstructs the embedding"
PROJECTED = "exact: through the projection"
THROUGH_HEAD = "through the final norm and projection, past all blocks in between"
DERIVATIVE = "derivative of the head at the mean image, past all blocks in between"
_STEP = 0.01
_CHUNK = 64


def text_directions(
    site: Site, dictionary: Dictionary, pixels: Float[Tensor, "n channels height width"] | None
) -> tuple[Float[Tensor, "d_sae d_embed"], str]:
    """Carry the decoder's directions into the space of texts (Discover-then-Name, eq. 3).

    At the embedding that is the direction itself. Elsewhere it is the direction without its mean,
    times the final LayerNorm's weight, through the projection. A head of another kind, such as
    SigLIP's attention pooling, is differentiated at the mean image.

    Args:
        site: Where the dictionary writes, in a model that reads text.
        dictionary: The dictionary.
        pixels: Images whose mean the head is differentiated at; needed for such heads alone.

    Returns:
        Unit directions, and how they were found.

    Raises:
        ValueError: the hook is not on the way to the embedding by its width.
    """
    model, hooks = site.model, site.model.hook_dict
    place = hooks[site.hook_name_out]
    directions = _into_stream(model, site.hook_name_out, decoder_directions(dictionary))
    norm, projection = _native(model, "ln_final"), _native(model, "unembed")
    linear = isinstance(projection, nn.Linear)

    def at(*names: str) -> bool:
        return any(place is hooks.get(name) for name in names)

    if at("unembed.hook_out", "hook_unembed"):
        return _unit(directions), EXACT
    if linear and at("ln_final.hook_out", "unembed.hook_in"):
        return _unit(directions @ projection.weight.detach().float().cpu().T), PROJECTED
    if directions.shape[1] != int(model.cfg.d_model) or "ln_final" in site.hook_name_out:
        raise ValueError(
            f"the decoder at {site.hook_name_out} writes vectors of {directions.shape[1]} numbers, "
            "which are not the residual stream's: use methods=dissect there"
        )
    has_class_token = model.token_layout().n_cls > 0
    if linear and isinstance(norm, nn.LayerNorm) and norm.weight is not None and has_class_token:
        weight = norm.weight.detach().float().cpu() * projection.weight.detach().float().cpu()
        centred = directions - directions.mean(-1, keepdim=True)
        return _unit(centred @ weight.T), THROUGH_HEAD
    assert pixels is not None
    return _unit(_derivatives(model, directions, pixels)), DERIVATIVE


def _into_stream(model: Any, hook_name: str, directions: Tensor) -> Tensor:
    """Return what directions of an MLP's neurons or of all heads write into the stream."""
    inside = re.fullmatch(r"blocks\.(\d+)\.(mlp\.hook_post|attn\.hook_z)", hook_name)
    if not inside:
        return directions
    block = model.blocks[int(inside.group(1))]
    part = block.mlp.out if "mlp" in hook_name else block.attn.o
    out = getattr(part, "original_component", None)
    if not isinstance(out, nn.Linear):
        return directions
    return directions @ out.weight.detach().float().cpu().T


def decoder_directions(dictionary: Dictionary) -> Float[Tensor, "d_sae d_out"]:
    """Return what each latent adds to the reconstruction, in float32 on the CPU."""
    size = (int(dictionary.cfg.d_sae), d_out(dictionary))
    W_dec = getattr(dictionary, "W_dec", None)
    if isinstance(W_dec, Tensor) and tuple(W_dec.shape) == size:
        return W_dec.detach().float().cpu()
    with torch.no_grad():
        start = dictionary.decode(torch.zeros(1, size[0]))
        rows = [dictionary.decode(part) - start for part in torch.eye(size[0]).split(1024)]
    return torch.cat(rows).float().cpu()


@torch.no_grad()
def _derivatives(model: Any, directions: Tensor, pixels: Tensor) -> Tensor:
    """Return central differences of the embedding along directions added at every token."""
    last = int(model.cfg.n_layers)
    with in_eval_mode(model):
        stream = model(pixels, stop_at_layer=last).mean(0, keepdim=True)
        size = _STEP * stream.norm(dim=-1).mean()
        found = []
        for some in _unit(directions).split(_CHUNK):
            step = (size * some.to(stream))[:, None]
            ends = [
                model.encode_image(stream + sign * step, normalize=False, start_at_layer=last)
                for sign in (1, -1)
            ]
            found.append((ends[0] - ends[1]).float().cpu())
    return torch.cat(found)


def _native(model: Any, name: str) -> Any:
    return getattr(getattr(model, name, None), "original_component", None)


def _unit(directions: Tensor) -> Tensor:
    return nn.functional.normalize(directions, dim=-1)
