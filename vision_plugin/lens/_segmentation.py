"""Maps of a text over the patches, and how well they find an object.

A patch's score for a text is the inner product of the text with what all heads read from that patch
into the class token, or with what the patch carries through an attention pool (Gandelsman et al.
2024, section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_plugin._extras import require_sklearn
from vision_plugin.lens._texts import check_head, embed_texts, unit
from vision_plugin.models.readout import Readout, frozen
from vision_plugin.models.site import hooked, in_eval_mode


@dataclass(frozen=True)
class SegmentationScores:
    """How well maps find an object's pixels.

    Attributes:
        pixel_accuracy: Share of all pixels that are on the right side.
        miou: Mean of the intersections over unions of object and background, each over all images.
        mean_ap: Mean over images of the average precision of the map as a score of the pixels.
        n_images: Number of images.

    Examples:
        >>> mask = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> mask[:, :2, :2] = True
        >>> scores = vp.lens.segmentation_scores(mask.float(), mask, threshold=0.5)
        >>> scores.pixel_accuracy, scores.n_images
        (1.0, 1)
    """

    pixel_accuracy: float
    miou: float
    mean_ap: float
    n_images: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the scores ready for JSON."""
        return dict(vars(self))


def text_maps(
    model: Any,
    pixels: Tensor,
    texts: Sequence[str] | Tensor,
    *,
    against: Sequence[str] | Tensor | None = None,
    layers: Sequence[int] | None = None,
    head: tuple[int, int] | None = None,
) -> Float[Tensor, "b c rows columns"]:
    """Return the map of each text over the patches of each image.

    Args:
        model: A VisionBridge.
        pixels: Images, ``[b, channels, height, width]``.
        texts: Texts, or their unit embeddings ``[c, d_embed]``.
        against: Texts whose mean map is taken off: what tells a text from others.
        layers: Layers whose heads count; all by default. Not for a tower that pools its tokens.
        head: One head (layer, number): the topic segmentation of CLIP-InterpreT.

    Raises:
        ValueError: the model has no such layer or head, or no text tower.

    Examples:
        >>> vp.lens.text_maps(model, pixels, ["a red circle", "a blue square"]).shape
        torch.Size([8, 2, 8, 8])
    """
    directions = _directions(model, texts, "texts")
    if against is not None:
        directions = directions - _directions(model, against, "against").mean(0)
    if layers is not None and head is not None:
        raise ValueError("layers= and head= exclude each other: give one of them")
    if head is not None:
        check_head(model, *head)
    for layer in layers or ():
        check_head(model, layer, 0)
    found = model.decompose(pixels, heads=head is not None, tokens=True, onto=directions)
    maps: Tensor
    if layers is None and head is None:
        maps = found.by_patch().permute(0, 3, 1, 2)
        return maps
    if not found.has_tokens:
        raise ValueError(
            f"{model.cfg.model_name} pools its tokens, so a map has no share of a layer or head: "
            "leave out layers= and head="
        )
    if head is not None:
        chosen = found.attention[:, head[0], head[1]]
    else:
        chosen = found.attention[:, list(layers or ())].sum(1)
    maps = found.on_grid(chosen, 1).permute(0, 3, 1, 2)
    return maps


def contrastive_maps(
    model: Any, pixels: Tensor, text: str, other: str, *, head: tuple[int, int] | None = None
) -> Float[Tensor, "b rows columns"]:
    """Return the map of one text less that of another, of all heads or of one.

    This is the contrastive segmentation of CLIP-InterpreT (Madasu et al. 2024, arXiv 2409.06579).

    Args:
        model: A VisionBridge.
        pixels: Images, ``[b, channels, height, width]``.
        text: The text whose map is wanted.
        other: The text whose map is taken off.
        head: One head (layer, number); None takes all.

    Raises:
        ValueError: the model has no such head, or no text tower.

    Examples:
        >>> vp.lens.contrastive_maps(model, pixels, "a red circle", "a blue square").shape
        torch.Size([8, 8, 8])
    """
    return text_maps(model, pixels, [text], against=[other], head=head)[:, 0]


@torch.no_grad()
def similarity_maps(
    model: Any, pixels: Tensor, texts: Sequence[str] | Tensor
) -> Float[Tensor, "b c rows columns"]:
    """Return the cosine of each patch's last state with each text, through the model's own head.

    A baseline: patch tokens go through normalisation and projection as the class token does, which
    no loss has asked of them.

    Args:
        model: A VisionBridge.
        pixels: Images, ``[b, channels, height, width]``.
        texts: Texts, or their unit embeddings ``[c, d_embed]``.

    Raises:
        ValueError: the model has no text tower, or reads its tokens through an attention pool.

    Examples:
        >>> vp.lens.similarity_maps(model, pixels, ["a red circle", "a blue square"]).shape
        torch.Size([8, 2, 8, 8])
    """
    directions = unit(_directions(model, texts, "texts"))
    readout: Readout = model.adapter.readout(model)
    if readout.pool is not None:
        raise ValueError(
            f"{model.cfg.model_name} reads its patches through an attention pool, so they have no "
            "similarity to a text of their own"
        )
    layout = model.token_layout(tuple(pixels.shape[-2:]))
    with in_eval_mode(model):
        stream = model(pixels, stop_at_layer=int(model.cfg.n_layers))
    x = stream[:, layout.indices("patch").to(stream.device)].to(directions.dtype)
    for norm in (readout.norm, readout.norm_after):
        x = frozen(norm, x)(x)
    for projection in readout.projections:
        bias = getattr(projection, "bias", None)
        x = x @ projection.weight.detach().to(x).T
        x = x if bias is None else x + bias.detach().to(x)
    maps: Tensor = (unit(x) @ directions.T).unflatten(1, layout.grid).permute(0, 3, 1, 2)
    return maps


@torch.no_grad()
def attention_maps(
    model: Any, pixels: Tensor, *, layer: int = -1
) -> Float[Tensor, "b rows columns"]:
    """Return the class token's attention to each patch, the mean of a layer's heads: a baseline.

    Args:
        model: A VisionBridge.
        pixels: Images, ``[b, channels, height, width]``.
        layer: Number of the layer; negative ones count from the last.

    Raises:
        ValueError: the model has no class token or no such layer.

    Examples:
        >>> vp.lens.attention_maps(model, pixels).shape
        torch.Size([8, 8, 8])
    """
    n_layers = int(model.cfg.n_layers)
    layer = layer + n_layers if layer < 0 else layer
    check_head(model, layer, 0)
    layout = model.token_layout(tuple(pixels.shape[-2:]))
    if layout.n_cls == 0:
        raise ValueError(f"{model.cfg.model_name} has no class token whose attention to show")
    seen: list[Tensor] = []

    def keep(pattern: Tensor, hook: Any) -> None:
        del hook
        seen.append(pattern[:, :, 0].float().mean(1))

    with in_eval_mode(model), hooked(model, {f"blocks.{layer}.attn.hook_pattern": keep}):
        model(pixels)
    patches = seen[0][:, layout.indices("patch").to(seen[0].device)]
    return patches.view(len(patches), *layout.grid)


def segmentation_scores(
    maps: Float[Tensor, "n rows columns"],
    masks: Bool[Tensor, "n_masks height width"],
    *,
    threshold: float | None = None,
) -> SegmentationScores:
    """Compare maps with masks of an object, pixel by pixel.

    Maps are enlarged bilinearly. A pixel counts as the object's where the map is above its mean
    over the image, as in Chefer et al. 2021 (arXiv 2012.09838), whom Gandelsman et al. follow.

    Args:
        maps: One map per image.
        masks: Pixels of the object.
        threshold: Value above which a pixel is the object's; None takes each map's mean.

    Raises:
        ValueError: there is no image, the numbers differ, or a map is no number.

    Examples:
        >>> mask = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> mask[:, :2, :2] = True
        >>> vp.lens.segmentation_scores(mask.float(), mask, threshold=0.5).miou
        1.0
    """
    if not len(maps) or len(maps) != len(masks):
        raise ValueError(f"there are {len(maps)} maps and {len(masks)} masks: give one of each")
    if not bool(maps.isfinite().all()):
        raise ValueError("maps= hold NaN or infinity")
    require_sklearn("maps of texts")
    from sklearn.metrics import average_precision_score

    large = torch.nn.functional.interpolate(
        maps[:, None].double(), size=masks.shape[1:], mode="bilinear", align_corners=False
    )[:, 0]
    at = large.mean((1, 2), keepdim=True) if threshold is None else threshold
    found, masks = large > at, masks.to(large.device)
    inside, outside = (found & masks).sum(), (~found & ~masks).sum()
    ious = [inside / (found | masks).sum(), outside / (~(found & masks)).sum()]
    precisions = [
        float(average_precision_score(mask.flatten().cpu(), score.flatten().cpu()))
        for mask, score in zip(masks, large, strict=True)
        if bool(mask.any())
    ]
    return SegmentationScores(
        pixel_accuracy=float((found == masks).double().mean()),
        miou=float(torch.stack(ious).double().nan_to_num(0.0).mean()),
        mean_ap=sum(precisions) / max(1, len(precisions)),
        n_images=len(maps),
    )


def _directions(model: Any, texts: Sequence[str] | Tensor, argument: str) -> Tensor:
    if isinstance(texts, Tensor):
        return texts.to(device=model.device)
    return embed_texts(model, texts, argument=argument)
