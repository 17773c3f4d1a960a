"""VISAEBench's seven metrics and ours on the same codes: the time of both, and the difference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_plugin import metrics

IMAGES_AT_ONCE = 8
"""Images whose latents our side computes at once; the benchmark takes 512 tokens."""


@dataclass(frozen=True)
class Data:
    """Images' activations, a dictionary, and what else the seven ask for."""

    sae: metrics.ControlDictionary
    activations: Tensor
    labels: Tensor
    embedded: Tensor
    shard: Path
    grid: int

    @classmethod
    def draw(cls, folder: str, *, small: bool, seed: int) -> Data:
        """Draw five classes of images around their centres."""
        n, grid, d_in, n_features = (60, 7, 16, 128) if small else (600, 14, 64, 2048)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % 5
        centres = torch.randn(5, d_in, generator=generator)
        noise = torch.randn(n, grid * grid, d_in, generator=generator)
        activations = centres[labels][:, None] + noise
        shard = Path(folder) / "shard.pt"
        torch.save(activations, shard)
        return cls(
            sae=metrics.random_dictionary(d_in, n_features, k=16, seed=seed),
            activations=activations,
            labels=labels,
            embedded=torch.randn(n, 32, generator=generator),
            shard=shard,
            grid=grid,
        )

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """One group of siblings."""
        return {"all": {"class_indices": list(range(5)), "hierarchy_depth": 1}}

    def ours(self, key: str, entry: str, known: dict[str, Any]) -> float:
        """Run our metric over batches of a few images, whose latents stay in a CPU's cache."""
        known = {
            "n_features": self.sae.cfg.d_sae,
            "d_in": self.sae.cfg.d_in,
            "d_embed": self.embedded.shape[1],
            "grid_size": (self.grid, self.grid),
            **known,
        }
        metric = metrics.build(key, known)
        _, wanted = metrics.takes(type(metric))
        for start in range(0, len(self.labels), IMAGES_AT_ONCE):
            rows = slice(start, start + IMAGES_AT_ONCE)
            tokens = self.activations[rows]
            latents = self.sae.encode(tokens)
            batch: dict[str, Any] = {
                "patch_latents": latents,
                "activations": tokens,
                "labels": self.labels[rows],
                "embeddings": self.embedded[rows],
            }
            if "latents" in wanted:
                batch["latents"] = latents.amax(1)
            if "reconstruction" in wanted:
                batch["reconstruction"] = self.sae.decode(latents)
            if "domain" in wanted:
                metrics.feed(metric, {**batch, "domain": "home"})
                batch["domain"] = "far"
            metrics.feed(metric, batch)
        return float(metrics.summary_of(metric.compute())[entry])

    def theirs(self, key: str, arguments: dict[str, Any], options: dict[str, Any]) -> float:
        """Run the benchmark's own metric."""
        import visaebench

        metric = visaebench.METRIC_REGISTRY[key](**arguments)
        # Its FVU counts the tokens of shards only; the others take the tensor.
        given = [self.shard] if key == "fvu" else self.activations
        return float(metric.compute(self.sae, given, device="cpu", **options).value)


class Lookup:
    """Gives back the embeddings in place of an encoder, so that only the metric is timed."""

    def extract_activations(self, images: list[Tensor], *, layer: int) -> Tensor:
        """One patch per image."""
        return torch.stack(images)[:, None]


def compare(
    *, small: bool, seed: int, repetitions: int, seconds: Callable[..., dict[str, float]]
) -> list[dict[str, Any]]:
    """Time all seven, ours and theirs, both computing latents from activations."""
    with tempfile.TemporaryDirectory() as folder:
        data = Data.draw(folder, small=small, seed=seed)
        n, n_features = len(data.labels), data.sae.cfg.d_sae
        everything = n_features + 1
        labelled = {"labels": data.labels.numpy()}
        far = {"far": {"activations": data.activations, "labels": data.labels.numpy()}}
        localization = {
            "grid_size": (data.grid, data.grid),
            "max_features": everything,
            "min_active_patches": 2,
            "max_images_per_feature": n + 1,
        }
        embedded = {"images": list(data.embedded), "evaluator_backbone": Lookup()}
        siblings = {**labelled, "sibling_groups": data.groups}
        cases: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
            "localization": ("mean_score", {"min_active_patches": 2}, localization, {}),
            "fvu": ("fvu", {}, {}, {}),
            "downstream_preservation": ("preservation", {}, {}, labelled),
            "sparse_probing": ("auc", {}, {}, labelled),
            "monosemanticity": (
                "mean_score",
                {"definition": "top16"},
                {"max_features": everything},
                embedded,
            ),
            "cross_domain": ("composite", {"domains": ["far"]}, {}, {"ood_datasets": far}),
            "absorption": ("rate", {"sibling_groups": data.groups}, {}, siblings),
        }
        rows = []
        for key, (entry, known, arguments, options) in cases.items():
            found, expected = data.ours(key, entry, known), data.theirs(key, arguments, options)
            reference = seconds(
                lambda k=key, a=arguments, o=options: data.theirs(k, a, o), repetitions
            )
            rows.append(
                {
                    "what": f"{key}, ours",
                    "size": f"{n} images, {data.grid**2} patches, K={n_features:,}",
                    **seconds(lambda k=key, e=entry, o=known: data.ours(k, e, o), repetitions),
                    "visaebench_seconds": reference["seconds"],
                    "difference": abs(found - expected),
                }
            )
    return rows
