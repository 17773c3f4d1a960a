"""Edits against hallucination: erasing an object's direction, and latent-space steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from vision_plugin.lens._language_reading import LanguageReading
from vision_plugin.models.site import in_eval_mode
from vision_plugin.steering import Directions, Edit

DirectionKind = Literal["unembedding", "hidden"]
DIRECTION_KINDS: tuple[DirectionKind, ...] = ("unembedding", "hidden")


@torch.no_grad()
def word_direction(
    vlm: Any, word: str, layer: int, *, kind: DirectionKind = "unembedding"
) -> Float[Tensor, " d_model"]:
    """Return the direction of a word among the hidden states of a language model.

    Args:
        vlm: A VisionLanguageBridge.
        word: A word of its vocabulary.
        layer: Number of blocks that ran; 0 is what enters the first block.
        kind: ``"unembedding"``: mean of the unembedding's rows of the word's tokens, which the
            authors' code takes; ``"hidden"``: hidden state of the word's last token in a prompt of
            the word alone, which the paper describes.

    Raises:
        ValueError: the vocabulary does not have the word, or there is no such layer or kind.

    Examples:
        >>> vp.lens.word_direction(vlm, "star", layer=1).shape
        torch.Size([128])
    """
    reading = LanguageReading(vlm)
    tokens = reading.tokens_of(word)
    if not 0 <= layer <= reading.n_layers:
        raise ValueError(f"layer={layer}: the language model's are 0 to {reading.n_layers}")
    if kind == "unembedding":
        weight: Tensor = vlm.language.unembed.original_component.weight
        return weight[tokens].float().mean(0)
    if kind != "hidden":
        raise ValueError(f"kind={kind!r}: use {' or '.join(DIRECTION_KINDS)}")
    start = reading.tokenizer.bos_token_id
    ids = torch.tensor([[*([] if start is None else [start]), *tokens]], device=vlm.device)
    hook = reading.hooks[layer]
    with in_eval_mode(vlm):
        _, cache = vlm.language.run_with_cache(ids, names_filter=hook, return_cache_object=False)
    found: Tensor = cache[hook][0, -1].float()
    return found


def project_away(
    vlm: Any,
    word: str,
    layer: int,
    *,
    weight: float = 1.0,
    kind: DirectionKind = "unembedding",
) -> Edit:
    """Return the edit of ProjectAway (Jiang et al. 2024, arXiv 2410.02762, algorithm 1).

    At every image token whose hidden state ``h`` has a positive coefficient along the word's
    direction ``t``, ``h`` becomes ``h - weight * <h, t> / <t, t> * t``; nothing else changes.

    Args:
        vlm: A VisionLanguageBridge.
        word: The object to erase.
        layer: Where, as for :func:`word_direction`.
        weight: 1 erases, more than 1 turns the coefficient round.
        kind: Kind of direction, see :func:`word_direction`.

    Raises:
        ValueError: as for :func:`word_direction`.

    Examples:
        >>> edit = vp.lens.project_away(vlm, "star", 1)
        >>> edit.hook_names
        ('blocks.0.hook_resid_post',)
    """
    direction = word_direction(vlm, word, layer, kind=kind)
    return erase(LanguageReading(vlm).hooks[layer], direction, weight)


def erase(hook_name: str, direction: Float[Tensor, " d"], weight: float = 1.0) -> Edit:
    """Return ProjectAway's edit for any direction at a hook of the language model."""
    place = Directions(hook_name, direction)
    return Edit.scale(place, {0: 1.0 - weight}, above=0.0, tokens="patch")


# ---------------------------------------------------------------------- latent-space steering


def steering_direction(changes: Float[Tensor, "demos d"]) -> Float[Tensor, " d"]:
    """Return the direction of VTI of changes that demonstrations make, of unit norm.

    It is the mean change plus the first principal component, which points to the mean's side.
    """
    changes = changes.double()
    mean = changes.mean(0)
    if len(changes) > 1:
        component = torch.linalg.svd(changes - mean, full_matrices=False).Vh[0]
        mean = mean + component * (1.0 if float(component @ mean) >= 0 else -1.0)
    return nn.functional.normalize(mean, dim=0).float()


@torch.no_grad()
def vti_visual(
    vlm: Any,
    images: Sequence[Image],
    *,
    strength: float = 0.9,
    n_masks: int = 50,
    masked: float = 0.99,
    seed: int = 0,
) -> Edit:
    """Return an edit of the tower that steers towards features that survive masking.

    Visual part of VTI (Liu et al. 2024, arXiv 2410.15778): per block, the direction from an
    image's hidden states to their mean over randomly masked copies. It is added to the output of
    each MLP in front of what the language model reads, ``0.1 * strength`` of the mean norm there,
    and each token keeps its norm. (The authors scale by each token's own norm.)

    Args:
        vlm: A VisionLanguageBridge.
        images: Demonstrations.
        strength: The authors' lambda.
        n_masks: Masked copies of each image.
        masked: Share of an image's patches that a mask fills with the image's mean.
        seed: Seed of the masks.

    Examples:
        >>> edit = vp.lens.vti_visual(vlm, world.images[:2], n_masks=2)
        >>> edit.hook_names
        ('blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out', 'blocks.2.hook_mlp_out')
    """
    vision = vlm.vision
    last = int(vision.cfg.n_layers) if vlm.reach.layers is None else max(vlm.reach.layers)
    streams = [f"blocks.{i}.hook_resid_post" for i in range(last)]
    outputs = [f"blocks.{i}.hook_mlp_out" for i in range(last)]
    layout, generator = vision.token_layout(), torch.Generator().manual_seed(seed)
    patches = layout.indices("patch").to(vision.device)
    changes: list[list[Tensor]] = [[] for _ in streams]
    norms = torch.zeros(last, dtype=torch.float64)
    for image in images:
        pixels = vision.preprocess([image])
        before = vision.harvest(pixels, [*streams, *outputs])
        after = vision.harvest(_masked(pixels, layout.grid, n_masks, masked, generator), streams)
        for place, hook in enumerate(streams):
            moved = after[hook][:, patches].mean(0) - before[hook][0, patches]
            changes[place].append(moved.mean(0).float().cpu())
            norms[place] += float(before[outputs[place]][0, patches].norm(dim=-1).mean())
    edit = Edit()
    for place, hook in enumerate(outputs):
        amount = 0.1 * strength * float(norms[place]) / len(images)
        direction = steering_direction(torch.stack(changes[place]))
        edit = edit + Edit.add(
            Directions(hook, direction), {0: amount}, tokens="patch", keep_norm=True
        )
    return edit


def _masked(
    pixels: Tensor, grid: tuple[int, int], n: int, share: float, generator: torch.Generator
) -> Tensor:
    """Return copies of an image with a share of its patches at the image's mean."""
    height, width = pixels.shape[-2:]
    n_patches = grid[0] * grid[1]
    n_hidden = min(n_patches - 1, round(share * n_patches))
    order = torch.rand(n, n_patches, generator=generator).argsort(1)
    hidden = torch.zeros(n, n_patches).scatter_(1, order[:, :n_hidden], 1.0)
    mask = nn.functional.interpolate(
        hidden.view(n, 1, *grid), size=(height, width), mode="nearest"
    ).to(pixels)
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return pixels * (1 - mask) + mean * mask


@torch.no_grad()
def vti_textual(
    vlm: Any,
    images: Sequence[Image],
    prompts: Sequence[str],
    truths: Sequence[str],
    hallucinated: Sequence[str],
    *,
    strength: float = 0.9,
) -> Edit:
    """Return an edit of the language model that steers from hallucinated answers to right ones.

    Textual part of VTI (Liu et al. 2024, arXiv 2410.15778): per block, the direction from the
    hidden state of the last token of a hallucinated answer to that of the right one, for the same
    image. It is added to each MLP's output at every token, as :func:`vti_visual` adds its own.

    Args:
        vlm: A VisionLanguageBridge.
        images: Demonstrations.
        prompts: What was asked about each.
        truths: The right answers, words of the vocabulary.
        hallucinated: Wrong answers.
        strength: The authors' lambda.

    Examples:
        >>> edit = vp.lens.vti_textual(
        ...     vlm, world.images[:2], ["Is there a star?"] * 2, ["no"] * 2, ["yes"] * 2
        ... )
        >>> edit.hook_names
        ('blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out')
    """
    reading = LanguageReading(vlm)
    streams = reading.hooks[1:]
    outputs = [f"blocks.{i}.hook_mlp_out" for i in range(reading.n_layers)]
    changes: list[list[Tensor]] = [[] for _ in streams]
    norms = torch.zeros(reading.n_layers, dtype=torch.float64)
    for image, prompt, truth, wrong in zip(images, prompts, truths, hallucinated, strict=True):
        with in_eval_mode(vlm):
            inputs = vlm.prepare([image], prompt)
            ends = {}
            for name, answer in (("truth", truth), ("wrong", wrong)):
                _, cache = vlm.run_with_cache(
                    _continued(inputs, reading.tokens_of(answer)),
                    names_filter=[*streams, *outputs],
                    return_cache_object=False,
                )
                ends[name] = cache
        for place, hook in enumerate(streams):
            moved = ends["truth"][hook][0, -1] - ends["wrong"][hook][0, -1]
            changes[place].append(moved.float().cpu())
            norms[place] += float(ends["truth"][outputs[place]][0].norm(dim=-1).mean())
    edit = Edit()
    for place, hook in enumerate(outputs):
        amount = 0.1 * strength * float(norms[place]) / len(images)
        direction = steering_direction(torch.stack(changes[place]))
        edit = edit + Edit.add(
            Directions(hook, direction), {0: amount}, tokens="all", keep_norm=True
        )
    return edit


def _continued(inputs: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """Return a prompt's inputs with an answer behind it."""
    ids = inputs["input_ids"]
    more = torch.tensor([list(tokens)], device=ids.device, dtype=ids.dtype)
    found = {**inputs, "input_ids": torch.cat([ids, more], dim=1)}
    if "attention_mask" in inputs:
        ones = torch.ones_like(more, dtype=inputs["attention_mask"].dtype)
        found["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    return found


def with_strength(edit: Edit, factor: float) -> Edit:
    """Return an edit that adds, with every amount multiplied by a factor."""
    changes = [replace(c, amounts=tuple(a * factor for a in c.amounts)) for c in edit.changes]
    return Edit(tuple(changes))


def with_random_directions(edit: Edit, seed: int) -> Edit:
    """Return an edit with random directions of the same norm in place of its own: a control."""
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for change in edit.changes:
        assert isinstance(change.basis, Directions)
        vectors = change.basis.vectors
        drawn = torch.randn(vectors.shape, generator=generator)
        norms = vectors.norm(dim=1, keepdim=True).cpu()
        rows = nn.functional.normalize(drawn, dim=1) * norms
        changes.append(replace(change, basis=Directions(change.basis.hook_name, rows)))
    return Edit(tuple(changes))
