"""Metrics of other packages: found, used, and when broken reported."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from torchmetrics import Metric

from tests.metrics._cases import CASES, K, images
from vision_plugin import metrics


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install packages the way an installer leaves them: modules and metadata on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(package, module, entry_points):
        (tmp_path / f"{package}.py").write_text(textwrap.dedent(module))
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[vision_plugin.metrics]\n{entry_points}\n")

    yield write
    for name in list(sys.modules):
        if name.startswith("someones_"):
            del sys.modules[name]


MEAN_LATENT = """
    import torch
    from torchmetrics import Metric

    class MeanLatent(Metric):
        full_state_update = False

        def __init__(self, *, n_features, power=1.0, **kwargs):
            super().__init__(**kwargs)
            self.power = power
            self.add_state("total", torch.zeros(n_features), dist_reduce_fx="sum")

        def update(self, latents):
            self.total += (latents ** self.power).sum(0)

        def compute(self):
            return self.total
"""


def test_ours_are_listed_and_work():
    listed = metrics.available()
    assert listed["monosemanticity"].usable
    assert listed["monosemanticity"].package.startswith("vision-plugin ")
    assert metrics.get("monosemanticity") is metrics.Monosemanticity
    for name, info in listed.items():
        if info.package.startswith("vision-plugin "):
            assert info.error is None, info
            assert issubclass(metrics.get(name), Metric)


def test_a_metric_of_another_package_is_found_built_and_fed(install):
    install("someones_metrics", MEAN_LATENT, "mean_latent = someones_metrics:MeanLatent")
    info = metrics.available()["mean_latent"]
    assert info == metrics.MetricInfo(
        "mean_latent", "someones_metrics:MeanLatent", "someones_metrics 1.2"
    )
    assert metrics.needs("mean_latent") == (("n_features",), ("latents",))
    metric = metrics.build("mean_latent", {"n_features": 3, "d_embed": 9})
    metrics.feed(metric, {"latents": torch.ones(4, 3), "embeddings": torch.ones(4, 9)})
    assert metric.compute().tolist() == [4, 4, 4]


def test_a_broken_metric_is_reported_and_breaks_nothing_else(install, caplog):
    install("someones_broken", "import no_such_module_anywhere", "broken = someones_broken:Metric")
    install("someones_number", "Metric = 3", "number = someones_number:Metric")
    listed = metrics.available()
    assert "no_such_module_anywhere" in listed["broken"].error
    assert "not a subclass of torchmetrics.Metric" in listed["number"].error
    assert not listed["broken"].usable
    assert listed["monosemanticity"].usable
    assert "metric 'broken' cannot be used" in caplog.text
    with pytest.raises(ImportError, match=r"'broken' of someones_broken 1\.2 is broken"):
        metrics.get("broken")


def test_two_packages_with_one_name_are_both_named(install):
    install("someones_first", MEAN_LATENT, "same = someones_first:MeanLatent")
    install("someones_second", MEAN_LATENT, "same = someones_second:MeanLatent")
    error = metrics.available()["same"].error
    assert "someones_first 1.2" in error
    assert "someones_second 1.2" in error


def test_an_unknown_name_gets_its_near_ones():
    with pytest.raises(ValueError, match="did you mean 'monosemanticity'"):
        metrics.get("monosemanticty")


def test_what_a_metric_lacks_is_named():
    with pytest.raises(ValueError, match=r"'monosemanticity' needs \['d_embed'\]"):
        metrics.build("monosemanticity", {"n_features": 3})
    metric = metrics.build("monosemanticity", {"n_features": 3, "d_embed": 2})
    with pytest.raises(ValueError, match=r"Monosemanticity.update needs \['embeddings'\]"):
        metrics.feed(metric, {"latents": torch.ones(4, 3)})


@pytest.mark.parametrize("name", ["sparsity", "uniqueness", "hierarchy", "dissection"])
def test_every_result_per_latent_has_a_score(name: str) -> None:
    case = CASES[name]
    metric = case.build()
    metrics.feed(metric, images())
    assert metric.compute().score.shape == (K,)
