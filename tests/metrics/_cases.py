"""Every metric of the registry with data for it, a row per image, to be split at will."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

import vision_plugin as vp
from tests.metrics._steerability_reference import standard_sae, tiny_clip
from vision_plugin import metrics

N, K, D, GRID, CLASSES = 36, 6, 4, (2, 3), 3


@functools.cache
def images() -> dict[str, Tensor]:
    """What is known of 36 images."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    labels = torch.arange(N) % CLASSES
    tokens = random(N, 7, K) * (random(N, 7, K) < 0.5)
    tokens[torch.arange(N), 1, labels] += 1
    latents = tokens.amax(1)
    latents[:, 3] += 1000  # far from 0, and the first half has another minimum
    latents[: N // 2, 3] -= 200
    activations = random(N, 7, D) + torch.nn.functional.one_hot(labels, D)[:, None]
    return {
        "latents": latents,
        "token_latents": tokens,
        "patch_latents": tokens[:, 1:],
        "embeddings": random(N, D) - 0.4,
        "labels": labels,
        "activations": activations.float(),
        "reconstruction": (0.9 * activations + 0.05).float(),
        "masks": random(N, 2, 4, 6) < 0.3,
        "logits": random(N, CLASSES),
        "spliced_logits": random(N, CLASSES),
        "ablated_logits": random(N, CLASSES),
        "decoder": random(N, 3, D),
        "other": random(N, 4, D),
        "pixels": torch.randn(N, 3, 8, 8, generator=generator),
    }


@functools.cache
def steered() -> dict[str, Any]:
    texts = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    sae = standard_sae("blocks.1.hook_resid_post", 16)
    return {"model": vp.wrap(tiny_clip()), "sae": sae, "text_embeddings": texts}


KNOWN: dict[str, Any] = {
    "n_features": K,
    "d_embed": D,
    "d_in": D,
    "grid_size": GRID,
    "n_concepts": 2,
    "taxonomy_paths": [(f"a{i % 3}", f"b{i % 5}") for i in range(N)],
    "sibling_groups": {"all": [0, 1, 2]},
    "domains": ["far"],
}

OPTIONS: dict[str, dict[str, Any]] = {
    "dissection": {"threshold": 0.3},
    "hierarchy": {"n_top": 4},
    "localization": {"min_images": 1, "min_active_patches": 1},
    "monosemanticity top16": {"images": "top16"},
    "sparse_probing": {"k_values": (1, 3)},
    "sparsity": {"token_kinds": ("cls", *["patch"] * 6)},
    "top_images": {"n_top": 4},
    "uniqueness": {"n_top": 4},
}

IN_ORDER = {
    "cross_domain": "a probe's split is of images by place",
    "downstream_preservation": "a probe's split is of images by place",
    "hierarchy": "paths belong to images by place",
    "sparse_probing": "a probe's split is of images by place",
    "stability": "cosines come one after the other",
    "top_images": "images are numbered by place",
}
"""Metrics whose result depends on the order of the images, so that merging has to keep it."""


@dataclass(frozen=True)
class Case:
    """One metric: how to build it, and how to feed it some of the images."""

    name: str

    @property
    def registered(self) -> str:
        return self.name.partition(" ")[0]

    def build(self) -> Metric:
        known: Mapping[str, Any] = KNOWN
        if self.registered == "steerability":
            known = {**KNOWN, **steered()}
        return metrics.build(self.registered, {**known, **OPTIONS.get(self.name, {})})

    def feed(self, metric: Metric, rows: slice) -> None:
        batch: dict[str, Any] = {name: value[rows] for name, value in images().items()}
        if not len(batch["labels"]):
            return
        if self.registered == "cross_domain":
            metrics.feed(metric, {**batch, "domain": "home"})
            batch["domain"] = "far"
        if self.registered == "stability":  # a pair of dictionaries in place of an image
            for decoder, other in zip(batch["decoder"], batch["other"], strict=True):
                metrics.feed(metric, {"decoder": decoder, "other": other})
            return
        metrics.feed(metric, batch)

    def result(self, metric: Metric) -> Any:
        """What it computed, as plain numbers."""
        return metric.compute().to_dict()


CASES: dict[str, Case] = {
    name: Case(name)
    for name in (
        *(n for n, i in metrics.available().items() if i.package.startswith("vision-plugin ")),
        "monosemanticity top16",
    )
}

compare: Callable[..., None] = functools.partial(
    torch.testing.assert_close, rtol=1e-6, atol=1e-9, equal_nan=True
)


def flat(value: Any, path: str = "") -> dict[str, float | str | None]:
    """Leaves of nested results by their path."""
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = list(enumerate(value))
    else:
        return {path: value}
    leaves: dict[str, float | str | None] = {}
    for name, part in parts:
        leaves |= flat(part, f"{path}/{name}")
    return leaves


def assert_same(found: Any, expected: Any) -> None:
    """The same leaves, numbers to nine digits."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, float) and isinstance(found[path], (int, float)):
            compare(torch.tensor(float(found[path])), torch.tensor(value), msg=path)
        else:
            assert found[path] == value, path
