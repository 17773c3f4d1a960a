"""Our seven shared metrics give the numbers of the installed ``visaebench`` package."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from vision_plugin import metrics

visaebench = pytest.importorskip(
    "visaebench", reason="the benchmark package is in the dev extra: pip install visaebench"
)

N, GRID, D, K, CLASSES = 150, (6, 6), 12, 40, 7


class SparseCode:
    """A TopK dictionary with a biased decoder, the way a trained SAE is imperfect."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(K, D, generator=generator)
        self.directions /= self.directions.norm(dim=1, keepdim=True)
        self.directions[-3:] = 0  # Dead latents.

    def encode(self, x: Tensor) -> Tensor:
        values, indices = (x @ self.directions.T).relu().topk(4, dim=-1)
        return torch.zeros(*x.shape[:-1], K).scatter(-1, indices, values)

    def decode(self, z: Tensor) -> Tensor:
        return 0.8 * z @ self.directions + 0.05


class Embedder:
    """Gives back embeddings hidden in the images; the benchmark averages over patches."""

    def extract_activations(self, images, *, layer):
        return torch.stack([image[None] for image in images])


@pytest.fixture(scope="module")
def world():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(N) % CLASSES
    centres = torch.randn(CLASSES, D, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    places = torch.rand(N, 2, generator=generator) * 5
    distance = (rows.flatten() - places[:, :1]) ** 2 + (columns.flatten() - places[:, 1:]) ** 2
    blob = torch.exp(-distance / 3)[:, :, None]
    noise = torch.randn(N, GRID[0] * GRID[1], D, generator=generator)
    activations = 2 * blob * centres[labels][:, None] + 0.6 * noise
    sae = SparseCode()
    latents = sae.encode(activations)
    return {
        "sae": sae,
        "activations": activations,
        "labels": labels,
        "latents": latents,
        "image_latents": metrics.pool_latents(latents, "max"),
        "embeddings": torch.randn(N, 9, generator=generator) + centres[labels][:, :9],
    }


def theirs(world, key, arguments=None, **options):
    """Run the benchmark's own metric on a CPU."""
    metric = visaebench.METRIC_REGISTRY[key](**(arguments or {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric.compute(world["sae"], world["activations"], device="cpu", **options)


@pytest.mark.parametrize("layout", ["patches", "csr"])
@pytest.mark.parametrize("batch", [150, 37])
def test_localization(world, layout, batch):
    expected = theirs(world, "localization", {"grid_size": GRID, "min_images_per_feature": 5})
    metric = metrics.Localization(n_features=K, grid_size=GRID, min_images=5)
    for part in torch.split(world["latents"], batch):
        metric.update(part if layout == "patches" else part.flatten(0, 1).to_sparse_csr())
    result = metric.compute()
    per_latent = [np.nan if v is None else v for v in expected.metadata["per_feature_scores"]]
    assert int((~result.score.isnan()).sum()) > 10
    np.testing.assert_allclose(result.score.numpy(), per_latent, atol=1e-5)
    summary = result.summary()
    assert summary["mean_score"] == pytest.approx(expected.value, abs=1e-5)
    assert summary["median_score"] == pytest.approx(expected.metadata["median_morans_i"], abs=1e-5)
    assert summary["share_non_localized"] == expected.metadata["frac_non_localized"]


def test_localization_with_the_benchmarks_cap(world):
    cap = {"grid_size": GRID, "min_images_per_feature": 5, "max_images_per_feature": 12}
    expected = theirs(world, "localization", cap)
    metric = metrics.Localization(n_features=K, grid_size=GRID, min_images=5, max_images=12)
    for part in torch.split(world["latents"], 64):
        metric.update(part)
    assert metric.compute().summary()["mean_score"] == pytest.approx(expected.value, abs=1e-5)


def test_fvu(world):
    sae, x = world["sae"], world["activations"].flatten(0, 1)
    x = x - x.mean(0) + 0.01
    expected = visaebench.METRIC_REGISTRY["fvu"]().compute(sae, x, device="cpu")
    metric = metrics.FVU(d_in=D)
    for part in torch.split(x, 512):
        metric.update(part, sae.decode(sae.encode(part)))
    assert metric.compute().fvu == pytest.approx(expected.value, abs=1e-5)


def test_downstream_preservation(world):
    sae, x, labels = world["sae"], world["activations"], world["labels"]
    expected = theirs(world, "downstream_preservation", labels=labels.numpy())
    metric = metrics.DownstreamPreservation(d_in=D)
    metric.update(x[:70], sae.decode(sae.encode(x[:70])), labels[:70])
    metric.update(x[70:], sae.decode(sae.encode(x[70:])), labels[70:])
    result = metric.compute()
    assert result.preservation == pytest.approx(expected.value, abs=1e-5)
    assert result.accuracy_original == expected.metadata["accuracy_original"]
    assert 1 / CLASSES < result.accuracy_reconstructed <= 1


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_sparse_probing(world, layout):
    expected = theirs(world, "sparse_probing", labels=world["labels"].numpy())
    metric = metrics.SparseProbing(n_features=K)
    for latents, labels in zip(
        torch.split(world["image_latents"], 64), torch.split(world["labels"], 64), strict=True
    ):
        metric.update(latents if layout == "dense" else latents.to_sparse_csr(), labels)
    result = metric.compute()
    assert result.accuracy == expected.metadata["k_accuracies"]
    assert result.auc == pytest.approx(expected.value, abs=1e-5)
    assert max(result.accuracy.values()) > result.majority


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_monosemanticity(world, layout):
    expected = theirs(
        world,
        "monosemanticity",
        images=list(world["embeddings"]),
        evaluator_backbone=Embedder(),
    )
    latents = world["image_latents"]
    latents = latents if layout == "dense" else latents.to_sparse_csr()
    result = metrics.monosemanticity(latents, world["embeddings"], definition="top16")
    assert result.summary()["n_defined"] == expected.metadata["num_features_scored"]
    assert result.summary()["mean_score"] == pytest.approx(expected.value, abs=1e-5)
    np.testing.assert_allclose(
        result.score[~result.score.isnan()].numpy(),
        expected.metadata["ms_distribution"],
        atol=1e-5,
    )


def test_cross_domain(world):
    sae = world["sae"]
    generator = torch.Generator().manual_seed(2)
    foreign = {}
    for name, scale in (("near", 0.5), ("far", 2.0)):
        x = world["activations"][:90] + scale * torch.randn(90, 36, D, generator=generator)
        foreign[name] = (x, torch.arange(90) % 3)
    entries = {
        name: {"activations": x, "labels": labels.numpy()} for name, (x, labels) in foreign.items()
    }
    expected = theirs(world, "cross_domain", ood_datasets=entries)
    metric = metrics.CrossDomain(n_features=K, domains=["near", "far"])
    metric.update(world["image_latents"], domain="home")
    for name, (x, labels) in foreign.items():
        codes = sae.encode(x)
        metric.update(
            codes.amax(1),
            domain=name,
            labels=labels,
            activations=x,
            reconstruction=sae.decode(codes),
        )
    result = metric.compute()
    assert result.composite == pytest.approx(expected.value, abs=1e-5)
    for name, scores in result.domains.items():
        detail = expected.metadata["per_dataset"][name]
        assert scores.composite == pytest.approx(detail["composite"], abs=1e-5)
        assert scores.fvu == pytest.approx(detail["ood_fvu"], abs=1e-5)
        assert scores.overlap == pytest.approx(detail["jaccard_overlap"])
        assert scores.probe_accuracy == pytest.approx(detail["probe_accuracy_k10"])


def test_absorption(world):
    groups = {
        "first": {"class_indices": [0, 1, 2], "hierarchy_depth": 1},
        "second": {"class_indices": [3, 4, 5, 6], "hierarchy_depth": 2},
        "pair": {"class_indices": [0, 6], "hierarchy_depth": 1},
    }
    expected = theirs(world, "absorption", labels=world["labels"].numpy(), sibling_groups=groups)
    metric = metrics.Absorption(n_features=K, sibling_groups=groups)
    metric.update(world["image_latents"][:80], world["labels"][:80])
    metric.update(world["image_latents"][80:].to_sparse_csr(), world["labels"][80:])
    result = metric.compute()
    assert result.rate == pytest.approx(expected.value, abs=1e-5)
    assert result.n_pairs == expected.metadata["num_tests"] == 7
    for pair, detail in zip(result.pairs, expected.metadata["per_pair_results"], strict=True):
        assert pair.overlap == pytest.approx(detail["overlap"])
        assert pair.f1_primary == pytest.approx(detail["f1_k1"], abs=1e-5)
        assert pair.f1_expanded == pytest.approx(detail["f1_k4"], abs=1e-5)
        assert pair.absorbed == detail["absorbed"]


def test_every_key_of_the_benchmark_is_registered_here():
    ours = metrics.available()
    assert all(ours[key].usable for key in visaebench.METRIC_REGISTRY)


def test_an_sae_of_ours_goes_through_the_benchmark_as_it_is(world, tmp_path, monkeypatch, capsys):
    """Trained on our kernel, saved, loaded as SAELens does; all seven metrics, ours beside them."""
    monkeypatch.setattr("visaebench.backbones.load_backbone", lambda *_, **__: Embedder())
    sae = SAE.load_from_disk(str(trained_sae(world["activations"], tmp_path)), device="cpu")
    labels, activations = world["labels"].numpy(), world["activations"]
    # Of one tensor [images, patches, d] its FVU counts images for tokens; of shards it does not.
    torch.save(activations, tmp_path / "shard.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = visaebench.evaluate(
            sae,
            activations=[tmp_path / "shard.pt"],
            labels=labels,
            images=list(world["embeddings"]),
            ood_datasets={"far": {"activations": 2 * activations, "labels": labels}},
            sibling_groups={"first": {"class_indices": [0, 1, 2], "hierarchy_depth": 1}},
            device="cpu",
        )
    assert "FAILED" not in capsys.readouterr().out
    found = {result.metric_name: result.value for result in results}
    assert len(found) == len(visaebench.METRIC_REGISTRY) == 7
    with torch.no_grad():
        latents = sae.encode(activations)
        reconstruction = sae.decode(latents)
    codes = latents.amax(1)
    ours = metrics.MetricSet(
        ["fvu", "sparse_probing", "downstream_preservation", "localization", "monosemanticity"],
        {"n_features": K, "d_in": D, "d_embed": 9, "grid_size": GRID},
        options={"monosemanticity": {"definition": "top16"}},
    )
    ours.update(
        {
            "latents": codes,
            "patch_latents": latents,
            "activations": activations,
            "reconstruction": reconstruction,
            "embeddings": world["embeddings"],
            "labels": world["labels"],
        }
    )
    scores = ours.scalars()
    pairs = {
        "fvu": "fvu/fvu",
        "sparse_probing_auc": "sparse_probing/auc",
        "downstream_preservation": "downstream_preservation/preservation",
        "feature_localization": "localization/mean_score",
        "monosemanticity": "monosemanticity/mean_score",
    }
    for theirs_name, our_name in pairs.items():
        assert scores[our_name] == pytest.approx(found[theirs_name], abs=1e-5), our_name


def trained_sae(activations, folder):
    """A TopK SAE trained for a few steps by SAELens's trainer on our sparse class."""
    sae_class, config_class = get_sae_training_class("vision_plugin_topk")
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=D, d_sae=K, k=4))
    tokens = activations.flatten(0, 1)

    def batches():
        while True:
            yield tokens[torch.randint(len(tokens), (256,))]

    config = SAETrainerConfig(
        total_training_samples=256 * 40,
        train_batch_size_samples=256,
        lr=3e-3,
        lr_end=3e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config, sae, batches()).fit().save_inference_model(str(folder / "sae"))
    return folder / "sae"
