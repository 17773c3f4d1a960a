"""Dictionaries that are no autoencoders, and CRAFT's importance of their concepts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, FastICA
from torch import Tensor

import vision_plugin as vp
from tests._clip import RESID, model, pixels
from vision_plugin.lens import concept_importance, fit_dictionary
from vision_plugin.lens._dictionaries import non_negative_codes
from vision_plugin.metrics import neuron_dictionary
from vision_plugin.models import VisionBridge
from vision_plugin.models.dictionary import Dictionary

__all__ = ["model", "pixels"]

METHODS = ("nmf", "semi_nmf", "ica", "kmeans")


def mixed(n: int = 200, k: int = 4, d: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sparse non-negative mixtures of non-negative parts, and the parts."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.rand(k, d, generator=generator) * (torch.rand(k, d, generator=generator) < 0.5)
    parts[torch.arange(k), torch.arange(k)] += 1
    codes = torch.rand(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < 0.4)
    return codes @ parts, parts


def test_codes_are_scipys_non_negative_least_squares() -> None:
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    found = non_negative_codes(x, directions)
    for row, codes in zip(x, found, strict=True):
        _, residual = nnls(directions.T.numpy(), row.numpy())
        assert bool((codes >= 0).all())
        ours = float((row - codes @ directions).norm())
        assert ours == pytest.approx(residual, abs=1e-5)


def test_nmf_is_scikit_learns() -> None:
    x, _ = mixed()
    fitted = NMF(4, init="nndsvda", random_state=0, max_iter=500).fit(x.double().numpy())
    ours = fit_dictionary(x, 4, "nmf")
    theirs = torch.as_tensor(fitted.components_)
    theirs = theirs / theirs.norm(dim=1, keepdim=True)
    torch.testing.assert_close(ours.W_dec.double(), theirs, atol=1e-5, rtol=1e-5)
    error = float((x - ours(x)).norm() / x.norm())
    assert error == pytest.approx(fitted.reconstruction_err_ / float(x.norm()), rel=0.05, abs=1e-3)


def test_semi_nmf_fits_activations_of_either_sign_better_than_its_start() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(4, 9, generator=generator)
    codes = torch.rand(300, 4, generator=generator)
    x = codes @ parts
    found, start = fit_dictionary(x, 4, "semi_nmf"), fit_dictionary(x, 4, "kmeans")
    assert bool((found.encode(x) >= 0).all())
    assert float((x - found(x)).norm()) < 0.3 * float((x - start(x)).norm())


def test_ica_is_scikit_learns() -> None:
    x, _ = mixed()
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ours = fit_dictionary(x, 5, "ica")
    fitted = FastICA(5, whiten="unit-variance", random_state=0, max_iter=500)
    sources = fitted.fit_transform(x.double().numpy())
    np.testing.assert_allclose(ours.encode(x).numpy(), sources, atol=1e-3)
    np.testing.assert_allclose(ours(x).numpy(), fitted.inverse_transform(sources), atol=1e-3)


def test_kmeans_is_scikit_learns() -> None:
    x, _ = mixed()
    fitted = KMeans(5, n_init=4, random_state=0, max_iter=500).fit(x.double().numpy())
    ours = fit_dictionary(x, 5, "kmeans")
    codes = ours.encode(x.view(20, 10, -1))
    assert codes.shape == (20, 10, 5)
    assert codes.flatten(0, 1).argmax(1).tolist() == fitted.labels_.tolist()
    assert bool((codes.sum(-1) == 1).all())


@pytest.mark.parametrize("method", METHODS)
def test_metrics_and_edits_take_them(method: str, model: VisionBridge, pixels: Tensor) -> None:
    with torch.no_grad():
        x = model.run_with_cache(pixels)[1][RESID].flatten(0, 1)
    fitted = fit_dictionary(x.relu() if method == "nmf" else x, 6, method).at(RESID)
    assert isinstance(fitted, Dictionary)
    assert fitted.at(RESID, tokens="cls").cfg.metadata["tokens"] == "cls"
    scores = vp.metrics.MetricSet(["fvu", "sparsity"], {"n_features": 6, "d_in": 32})
    latents = fitted.encode(x)
    scores.update(
        {
            "activations": x[:, None],
            "reconstruction": fitted.decode(latents)[:, None],
            "token_latents": latents[:, None],
            "latents": latents,
        }
    )
    assert scores.scalars()
    before = model.encode_image(pixels)
    with model.steer(fitted, {0: 5.0}):
        assert not torch.allclose(model.encode_image(pixels), before)


def test_what_cannot_be_fitted_is_refused() -> None:
    x, _ = mixed()
    for options, says in (
        ({"method": "pca"}, "is no dictionary"),
        ({"method": "nmf", "activations": x - 1}, "never below 0"),
        ({"method": "ica", "n_features": 10}, "between 1 and 9"),
        ({"n_features": 0}, "between 1 and 200"),
        ({"activations": x / 0}, "NaN or infinity"),
    ):
        given = {"activations": x, "n_features": 3, **options}
        with pytest.raises(ValueError, match=says):
            fit_dictionary(given.pop("activations"), given.pop("n_features"), **given)


def test_importance_is_the_closed_form(model: VisionBridge, pixels: Tensor) -> None:
    """An answer that adds squares of three factors has known indices; a fourth plays no part.

    The embedding is replaced by what the dictionary decodes, so the answer is one of its latents.
    """
    width = model.encode_image(pixels).shape[1]
    identity = neuron_dictionary(width).at("unembed.hook_out")
    start = model.encode_image(pixels[:1], normalize=False)[0, :4].double()
    weight = torch.tensor([3.0, 1.0, 0.5, 0.0]).double()

    seen: list[Tensor] = []
    inner = model.image_features

    def answer_of_raw(unit: Tensor) -> Tensor:
        del unit
        return ((seen.pop()[:, :4].double() / start).square() * weight).sum(1)

    class Raw:
        """The model, with its embedding kept before it is scaled to norm 1."""

        def __getattr__(self, name: str) -> object:
            return getattr(model, name)

        def image_features(self, images: Tensor) -> Tensor:
            seen.append(model.encode_image(images, normalize=False))
            return inner(images)

    found = concept_importance(
        Raw(), identity, pixels[:1], answer_of_raw, latents=[0, 1, 2, 3], design=256
    )
    # A sum of one term each: a total index is the term's share of the variance.
    expected = weight.square() / weight.square().sum()
    torch.testing.assert_close(found.importance, expected, atol=0.03, rtol=0)
    assert found.ranked()[0] == 0
    assert found.n_passes == 256 * 6
    bars = found.plot().axes[0].patches
    drawn = [bar.get_width() for bar in bars]  # type: ignore[attr-defined]
    assert drawn == pytest.approx(sorted(found.importance.tolist(), reverse=True))


def test_an_answer_that_never_changes_has_no_importance(
    model: VisionBridge, pixels: Tensor
) -> None:
    identity = neuron_dictionary(32).at(RESID)
    found = concept_importance(
        model, identity, pixels[:1], lambda e: torch.ones(len(e)), latents=[3, 4], design=2
    )
    assert bool(found.each.isnan().all())
    with pytest.raises(ValueError, match="power of 2"):
        concept_importance(model, identity, pixels, lambda e: e[:, 0], design=12)
    with pytest.raises(ValueError, match="out of range"):
        concept_importance(model, identity, pixels, lambda e: e[:, 0], latents=[32])
