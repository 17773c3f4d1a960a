"""The map: features with directions alike lie together, by UMAP and by principal components."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from tests.report.conftest import topk_sae
from vision_plugin.report._map import feature_map

needs_umap = pytest.mark.skipif(
    importlib.util.find_spec("umap") is None,
    reason="needs umap-learn: pip install 'vision-plugin[map]'",
)


def clustered(n_each=30, n_groups=3):
    """An SAE whose decoder directions lie around a few, and the group of each."""
    sae = topk_sae(d_sae=n_each * n_groups)
    centres = torch.nn.functional.normalize(torch.randn(n_groups, 32), dim=1)
    of = torch.arange(n_groups).repeat_interleave(n_each)
    with torch.no_grad():
        sae.W_dec.copy_(centres[of] + 0.05 * torch.randn(len(of), 32))
    return sae, of.numpy()


def purity(points, of, n=5):
    """Share of each point's nearest points that are of its group."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1)[:, :n]
    return float((of[near] == of[:, None]).mean())


@pytest.mark.parametrize(
    "method", ["pca", pytest.param("umap", marks=[needs_umap, pytest.mark.slow])]
)
def test_directions_alike_lie_together(method):
    sae, of = clustered()
    found = feature_map(sae, list(range(90)), method)
    assert found is not None
    assert found.method == method.upper()
    assert found.points.shape == (90, 2)
    assert found.points.min() >= 0
    assert found.points.max() <= 1
    assert purity(found.points, of) > 0.95
    again = feature_map(sae, list(range(90)), method)
    assert np.array_equal(found.points, again.points)


def test_the_plain_map_is_that_of_the_singular_vectors():
    sae, _ = clustered()
    found = feature_map(sae, list(range(90)), "pca")
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1).double().numpy()
    centred = unit - unit.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    spread = np.ptp(expected, axis=0).max()
    for place in range(2):
        one, other = found.points[:, place] - 0.5, expected[:, place] / spread
        other -= (other.min() + other.max()) / 2
        assert min(np.abs(one - other).max(), np.abs(one + other).max()) < 1e-6
    assert f"{(sizes[:2] ** 2).sum() / (sizes**2).sum():.0%}" in found.note


def test_umap_is_asked_for_by_name_where_it_is_not_installed():
    if importlib.util.find_spec("umap") is not None:
        pytest.skip("umap-learn is installed here: there is nothing to refuse")
    sae, _ = clustered()
    with pytest.raises(ValueError, match=r"pip install 'vision-plugin\[map\]'"):
        feature_map(sae, list(range(90)), "umap")
    assert feature_map(sae, list(range(90)), "auto").method == "PCA"


def test_few_features_and_no_directions_have_no_map():
    sae, _ = clustered()
    assert feature_map(sae, [0, 1], "pca") is None
    assert feature_map(sae, list(range(90)), "none") is None
