"""Scores of a dictionary, trained or not, on the held-out pictures of ``dinov2.py``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_plugin import metrics

TOKENS = [0, *(1 + 16 * row + column for row in range(1, 16, 2) for column in range(1, 16, 2))]
"""Tokens that are scored: the class token, and one in four patches, evenly spread."""
KINDS = ["cls"] + ["patch"] * (len(TOKENS) - 1)
POOLINGS = ("patches", "class token")
"""How a picture gets one value per latent: the maximum over its patches, or its class token."""
LEAST_PICTURES = 10
"""Pictures that a latent fires on, at least, to be called the best; a folder's, to be probed."""
PROBED_ON = (1, 5, 20)
N_TOP = 16
Judged = dict[tuple[str, str], metrics.MonosemanticityResult]
"""Monosemanticity by pooling and judge."""


@dataclass(frozen=True)
class Held:
    """The held-out pictures."""

    folders: list[str]
    """Folder of each picture."""
    judges: dict[str, Tensor]
    """What says which pictures are alike: embeddings ``[n, d]`` by the judge's name."""

    @property
    def probed(self) -> tuple[list[int], list[int]]:
        """Pictures in folders that are large enough to be probed, and the folders' numbers."""
        size = Counter(self.folders)
        known = sorted(folder for folder in size if size[folder] >= LEAST_PICTURES)
        rows = [i for i, folder in enumerate(self.folders) if folder in known]
        return rows, [known.index(self.folders[i]) for i in rows]


@dataclass(frozen=True)
class Read:
    """What a dictionary makes of the held-out pictures."""

    latents: dict[str, Tensor]
    """Values of each picture by pooling, ``[n, k]``."""
    sparsity: metrics.SparsityResult
    explained: dict[str, float]
    """Explained variance by kind of token, around that kind's own mean."""

    def monosemanticity(self, held: Held) -> Judged:
        """Return the scores by pooling and judge."""
        return {
            (pooling, judge): metrics.monosemanticity(latents, embeddings)
            for pooling, latents in self.latents.items()
            for judge, embeddings in held.judges.items()
        }


@torch.no_grad()
def read(dictionary: Any, x: Tensor) -> Read:
    """Encode and decode activations ``[n, tokens, d_in]`` whose first token is the class token."""
    sparsity = metrics.Sparsity(n_features=int(dictionary.cfg.d_sae), token_kinds=KINDS)
    of_kind = {"cls": slice(0, 1), "patch": slice(1, None)}
    fidelity = {k: metrics.FVU(d_in=x.shape[-1], definition="per_dimension") for k in of_kind}
    pooled: dict[str, list[Tensor]] = {pooling: [] for pooling in POOLINGS}
    for part in x.split(32):
        latents = dictionary.encode(part)
        decoded = dictionary.decode(latents)
        sparsity.update(latents)
        for kind, rows in of_kind.items():
            fidelity[kind].update(part[:, rows], decoded[:, rows])
        pooled["patches"].append(latents[:, 1:].amax(1))
        pooled["class token"].append(latents[:, 0].clone())
    return Read(
        latents={pooling: torch.cat(parts) for pooling, parts in pooled.items()},
        sparsity=sparsity.compute(),
        explained={k: float(one.compute().explained_variance) for k, one in fidelity.items()},
    )


def scores(
    one: Read, held: Held, random: Judged | None, groups: Sequence[int] | None
) -> tuple[dict[str, Any], Judged]:
    """Return every score of a dictionary, and its monosemanticity latent by latent.

    Args:
        one: What the dictionary makes of the pictures.
        held: The pictures.
        random: Monosemanticity of random directions of the same width, to compare with at equal
            firing; None for these themselves.
        groups: Cumulative widths of a Matryoshka SAE's groups.
    """
    top = metrics.top_images(one.latents["patches"], n_top=N_TOP).images
    judged = one.monosemanticity(held)
    found = {
        "d_sae": top.shape[0],
        "l0": one.sparsity.l0,
        "l0_by_kind": one.sparsity.l0_by_kind,
        "explained_variance": one.explained,
        "n_dead": one.sparsity.n_dead,
        "n_dense": one.sparsity.n_dense,
        "monosemanticity": {
            pooling: {
                judge: _summary(
                    judged[pooling, judge], None if random is None else random[pooling, judge]
                )
                for judge in held.judges
            }
            for pooling in POOLINGS
        },
        "probing": {pooling: _probing(latents, held) for pooling, latents in one.latents.items()},
        "uniqueness": _uniqueness(top),
        "hierarchy": _hierarchy(top, held, groups, judged["patches", "folders"]),
    }
    return found, judged


def _summary(
    result: metrics.MonosemanticityResult, random: metrics.MonosemanticityResult | None
) -> dict[str, Any]:
    score = result.score
    defined, often = ~score.isnan(), result.n_active >= LEAST_PICTURES
    found = {
        "mean": float(score[defined].mean()) if bool(defined.any()) else math.nan,
        "best": _largest(score[defined & often]),
        "best_of_any": _largest(score[defined]),
        "worst": -_largest(-score[defined & often]),
        "n_defined": int(defined.sum()),
        "n_often": int((defined & often).sum()),
        "chance": result.mean_similarity,
        "share_z_above_3": result.summary()["share_z_above_3"],
    }
    if random is not None:
        equal = metrics.compare_at_equal_firing(result, random)
        found["against_random"] = {
            "difference": equal.difference,
            "low": equal.low,
            "high": equal.high,
            "verdict": equal.verdict,
            "n_latents": equal.n_latents,
        }
    return found


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else math.nan


def _probing(latents: Tensor, held: Held) -> dict[str, Any] | None:
    """Return the accuracy of probes for folders; None where fewer than two are large enough."""
    rows, labels = held.probed
    if len(set(labels)) < 2:
        return None
    probing = metrics.SparseProbing(
        n_features=latents.shape[1], k_values=PROBED_ON, rank_on="train", test_size=0.5
    )
    probing.update(latents[rows], torch.tensor(labels))
    result = probing.compute()
    return {
        "accuracy": {str(k): value for k, value in result.accuracy.items()},
        "majority": result.majority,
        "n_test": round(0.5 * result.n_images),
        "n_classes": result.n_classes,
    }


def _uniqueness(top: Tensor) -> dict[str, Any]:
    result = metrics.uniqueness(top)
    shares = dict(zip(result.thresholds, result.share_above, strict=True))
    return {
        "above_0": shares[0.0],
        "above_half": shares[0.5],
        "nearest": float(result.max_jaccard.nanmean()),
        "n_left_out": result.n_left_out,
    }


def _hierarchy(
    top: Tensor,
    held: Held,
    groups: Sequence[int] | None,
    by_folder: metrics.MonosemanticityResult,
) -> dict[str, Any]:
    paths = [tuple(folder.split("/")) for folder in held.folders]
    numbers = None if groups is None else metrics.matryoshka_groups(groups)
    result = metrics.hierarchy(top, paths, numbers)
    found: dict[str, Any] = {
        "depth": result.summary()["mean_depth"],
        "chance": result.chance_depth,
        "n_left_out": result.n_left_out,
    }
    if numbers is not None:
        found["groups"] = [
            {
                "depth": result.group_depth[group],
                "n_latents": result.group_size[group],
                "by_folders": float(by_folder.score[numbers == group].nanmean()),
            }
            for group in sorted(result.group_depth)
        ]
    return found
