"""Heads that read a printed word into the class token, taken away one by one.

Dyslexify's rule (ICLR 2026): heads in the order of their attention to the text; a head goes if that
raises the accuracy on attacked images; the search ends at a drop on clean images or after too many
heads in a row that do not help.
"""

from __future__ import annotations

from typing import Any

import torch

from vision_plugin.models.site import in_eval_mode
from vision_plugin.steering import Edit
from vision_plugin.tasks._attack import Attack
from vision_plugin.tasks._candidates import Candidate
from vision_plugin.tasks._measure import Judge

LEAST_GAIN = 0.001
MOST_SKIPPED = 10
_DIFFERS = 1e-3


def heads_by_attention(
    model: Any, train: Attack, *, batch_size: int
) -> list[tuple[float, int, int]]:
    """Return (score, block, head), the highest score first.

    The score is the class token's attention to the patches of the word, as a share of its attention
    to all patches, on attacked images. The word's patches are those that differ between the two
    images of a pair.
    """
    layout = model.token_layout()
    patches = layout.indices("patch")
    names = [f"blocks.{block}.attn.hook_pattern" for block in range(int(model.cfg.n_layers))]
    total = torch.zeros(len(names), int(model.cfg.n_heads), dtype=torch.float64)
    n = 0
    for clean, attacked in zip(
        train.clean.split(batch_size), train.attacked.split(batch_size), strict=True
    ):
        differs = ((clean - attacked).abs() > _DIFFERS).any(1).float()[:, None]
        word = torch.nn.functional.adaptive_max_pool2d(differs, layout.grid).flatten(1)
        with torch.no_grad(), in_eval_mode(model):
            _, cache = model.run_with_cache(attacked, names_filter=names, return_cache_object=False)
        for row, name in enumerate(names):
            to_patches = cache[name][:, :, 0][:, :, patches].double()
            to_word = (to_patches * word[:, None].to(to_patches)).sum(-1)
            share = to_word / to_patches.sum(-1).clamp(min=1e-12)
            total[row] += share.sum(0).cpu()
        n += len(clean)
    scores = (total / n).flatten()
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    n_heads = total.shape[1]
    return [(float(scores[i]), i // n_heads, i % n_heads) for i in order]


def without_heads(model: Any, heads: list[tuple[int, int]]) -> Edit:
    """Return the edit that sets the results of heads (block, number) at the class token to 0."""
    width = int(model.cfg.d_head)
    edit = Edit()
    for block in sorted({block for block, _ in heads}):
        dimensions = [
            head * width + place
            for at, head in sorted(heads)
            if at == block
            for place in range(width)
        ]
        edit += Edit.suppress(f"blocks.{block}.attn.hook_z", dimensions, tokens="cls")
    return edit


def choose_heads(
    model: Any, train: Attack, validation: Judge, *, cap: float, batch_size: int
) -> Candidate:
    """Return the edit of the greedy search on the validation pairs; no edit if no head helps."""
    chosen: list[tuple[int, int]] = []
    best = validation.score(Edit()).value
    floor = validation.upkeep(Edit()).value - cap
    skipped = 0
    for _, block, head in heads_by_attention(model, train, batch_size=batch_size):
        edit = without_heads(model, [*chosen, (block, head)])
        accuracy = validation.score(edit, above=best).value
        if accuracy < best + LEAST_GAIN or validation.upkeep(edit, least=floor).value < floor:
            skipped += 1
            if skipped > MOST_SKIPPED:
                break
            continue
        chosen.append((block, head))
        best, skipped = accuracy, 0
    how = ", ".join(f"block {block} head {head}" for block, head in chosen)
    return Candidate("heads", without_heads(model, chosen), len(chosen), None, how)


def has_heads(model: Any) -> bool:
    """Return whether the model has a class token and separate heads."""
    has_class_token = int(model.token_layout().n_cls) > 0
    return has_class_token and "blocks.0.attn.hook_z" in model.hook_dict
