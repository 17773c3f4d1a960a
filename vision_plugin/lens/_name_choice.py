"""Which of a latent's candidates becomes its name, and how far methods agree."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from vision_plugin.lens._name_checks import shuffled
from vision_plugin.lens._names import NameCandidates


def chosen(candidates: Mapping[str, NameCandidates]) -> tuple[str | None, ...]:
    """Return the method of each latent's name: the best AUROC on the images of the making.

    Of equals, and where no AUROC is known, it is the first that has a name.
    """
    methods = list(candidates)
    aurocs = torch.stack([candidates[m].making_auroc.nan_to_num(nan=-1.0) for m in methods])
    found: list[str | None] = []
    for latent, column in enumerate(aurocs.T.tolist()):
        named = [
            (-value, place)
            for place, value in enumerate(column)
            if candidates[methods[place]].names[latent] is not None
        ]
        found.append(methods[min(named)[1]] if named else None)
    return tuple(found)


def agreement(
    words: dict[str, Tensor], texts: Tensor | None, seed: int
) -> dict[str, dict[str, float | None]]:
    """Return how far each two methods agree.

    ``same`` is the share of latents with the same name, of those that both name; ``similarity`` the
    mean cosine of the two names' text embeddings; ``shuffled`` that with names of other latents.
    """
    found: dict[str, dict[str, float | None]] = {}
    for one, other in combinations(words, 2):
        both = (words[one] >= 0) & (words[other] >= 0)
        a, b = words[one][both], words[other][both]
        numbers: dict[str, float | None] = {"n_latents": float(len(a))}
        if len(a):
            numbers["same"] = float((a == b).double().mean())
        if texts is not None and len(a):
            mixed = shuffled(b, seed)
            kept = mixed >= 0
            numbers["similarity"] = float((texts[a] * texts[b]).sum(-1).mean())
            numbers["shuffled"] = (
                float((texts[a[kept]] * texts[mixed[kept]]).sum(-1).mean()) if kept.any() else None
            )
        found[f"{one}|{other}"] = numbers
    return found
