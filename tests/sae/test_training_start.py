"""How a run begins: scales, decoder biases and directions from the data, warm-up and decay."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.training.sae_trainer import SAETrainer
from scipy.optimize import minimize

from tests.activations.conftest import one_thread
from tests.sae._runs import ARCHITECTURES, BATCH, MLP_OUT, config, images, runner, store_of
from vision_plugin.activations import ExtractionConfig, StoreMismatchError, extract
from vision_plugin.images import open_images
from vision_plugin.models import load_model
from vision_plugin.models.site import signature
from vision_plugin.sae import training_config_class
from vision_plugin.sae._initialise import geometric_median
from vision_plugin.sae._sources import check_store

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 12), outlier=st.sampled_from([0.0, 1e3]))
def test_the_geometric_median_has_the_least_sum_of_distances(
    seed: int, n: int, outlier: float
) -> None:
    points = np.random.default_rng(seed).normal(size=(n, 3))
    points[0] += outlier

    def total(place: Any) -> float:
        return float(np.linalg.norm(points - place, axis=1).sum())

    starts = [np.median(points, axis=0), *points]
    best = min(
        minimize(total, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9}).fun
        for start in starts[:3]
    )
    found = geometric_median(torch.from_numpy(points), tolerance=1e-10, max_iterations=5000)
    assert total(found.numpy()) <= best * (1 + 1e-4) + 1e-9


def first_weights(monkeypatch: Any, architecture: str = "topk", **changes: Any) -> dict[str, Any]:
    """Weights, scaler and buffer of a run right before its first step."""
    seen: dict[str, Any] = {}
    before = SAETrainer.step

    def step(self: Any, batch: torch.Tensor) -> Any:
        if not seen:
            seen.update({n: p.detach().clone() for n, p in self.sae.named_parameters()})
            seen["scale"] = self.activation_scaler.scaling_factor
            seen["first"] = batch.clone()
        return before(self, batch)

    monkeypatch.setattr(SAETrainer, "step", step)
    run = runner(config(None, architecture, **changes))
    seen_buffer = run.batches.sample().clone()
    run.run()
    return {**seen, "buffer": seen_buffer}


def test_a_scale_is_estimated_from_no_more_batches_than_a_run_has(monkeypatch) -> None:
    """A number without end would read the images without end."""
    scaled = training_config_class("topk")(
        d_in=16, d_sae=48, k=4, normalize_activations="expected_average_only_in"
    )
    few, many = (
        first_weights(monkeypatch, sae=scaled, n_batches_for_norm_estimate=n)["scale"]
        for n in (100, 999_999)
    )
    assert few == many is not None


def test_sae_lens_s_own_start_is_the_default(monkeypatch) -> None:
    start = first_weights(monkeypatch)
    assert not start["b_dec"].any()


@pytest.mark.parametrize("method", ["mean", "geometric_median"])
def test_the_decoder_bias_begins_at_the_centre_of_the_first_buffer(method, monkeypatch) -> None:
    start = first_weights(monkeypatch, b_dec_init_method=method)
    buffer = start["buffer"]
    expected = buffer.mean(0) if method == "mean" else geometric_median(buffer)
    torch.testing.assert_close(start["b_dec"], expected)
    assert torch.equal(start["first"], buffer[:BATCH]), "the first batch was taken out"


def test_the_centre_is_that_of_scaled_activations(monkeypatch) -> None:
    scaled = ARCHITECTURES["topk"](normalize_activations="expected_average_only_in")
    start = first_weights(monkeypatch, sae=scaled, b_dec_init_method="mean")
    assert start["scale"] is not None
    torch.testing.assert_close(start["b_dec"], (start["buffer"] * start["scale"]).mean(0))
    assert torch.equal(start["first"], start["buffer"][:BATCH]), "the estimate took batches"


def test_directions_begin_as_centred_activations(monkeypatch) -> None:
    start = first_weights(monkeypatch, b_dec_init_method="mean", decoder_init_method="data")
    centred = start["buffer"] - start["buffer"].mean(0)
    cosines = (
        torch.nn.functional.normalize(start["W_dec"], dim=1)
        @ torch.nn.functional.normalize(centred, dim=1).T
    )
    assert (cosines.max(dim=1).values > 1 - 1e-5).all()
    assert len(cosines.argmax(dim=1).unique()) == 32
    torch.testing.assert_close(start["W_dec"].norm(dim=1), torch.full((32,), 0.1))
    torch.testing.assert_close(start["W_enc"], start["W_dec"].T)


def test_too_few_activations_leave_the_rest_random(monkeypatch, caplog) -> None:
    wide = dataclasses.replace(ARCHITECTURES["topk"](), d_sae=500)
    start = first_weights(monkeypatch, sae=wide, decoder_init_method="data")
    n = len(start["buffer"])
    assert f"the buffer holds {n} activations for 500 latents" in caplog.text
    torch.testing.assert_close(start["W_dec"].norm(dim=1), torch.full((500,), 0.1))


def test_a_transcoder_begins_at_the_centre_of_what_it_writes(monkeypatch) -> None:
    start = first_weights(monkeypatch, "transcoder", b_dec_init_method="mean")
    torch.testing.assert_close(start["b_dec"], start["buffer"][:, 16:].mean(0))
    assert MLP_OUT.endswith("mlp_out")


def test_the_learning_rate_warms_up_and_decays(monkeypatch) -> None:
    rates: list[float] = []
    plain = SAETrainer.step

    def step(self: Any, batch: torch.Tensor) -> Any:
        rates.append(self.optimizer.param_groups[0]["lr"])
        return plain(self, batch)

    monkeypatch.setattr(SAETrainer, "step", step)
    runner(config(None, lr=1e-3, lr_warm_up_steps=4, lr_decay_steps=8)).run()
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4:17] == pytest.approx([1e-3] * 13)
    assert rates[17:24] == pytest.approx([1e-3 * (1 - i / 8) for i in range(1, 8)])


def test_latents_are_dead_after_the_window_that_was_set(monkeypatch) -> None:
    masks: list[int] = []
    plain = SAETrainer.step

    def step(self: Any, batch: torch.Tensor) -> Any:
        masks.append(int(self.dead_neurons.sum()))
        return plain(self, batch)

    monkeypatch.setattr(SAETrainer, "step", step)
    wide = dataclasses.replace(ARCHITECTURES["topk"](), d_sae=512, k=1)
    runner(config(None, sae=wide, dead_feature_window=5)).run()
    assert masks[:6] == [0] * 6
    assert masks[6] > 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("b_dec_init_method", "median", "use auto, zeros, mean, geometric_median"),
        ("decoder_init_method", "pca", "use auto, random, data"),
        ("n_checkpoints", -1, "use 0 or a larger number"),
        ("lr_warm_up_steps", -1, "use 0 or a larger number"),
        ("training_tokens", 10**25, "training_tokens=1.*: use a finite number below 2.53"),
        ("encoder_lr_ratio", math.inf, "encoder_lr_ratio=inf: use a finite number"),
        ("mono_coefficient", math.nan, "mono_coefficient=nan: use a finite number"),
    ],
)
def test_nonsense_is_refused_when_it_is_said(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(None, **{field: value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_sae": 10_000_001}, "d_sae=10000001: use at most 10,000,000 latents"),
        ({"decoder_init_norm": 0.0}, "decoder_init_norm=0.0: use a number above 0, up to 1e.06"),
        ({"decoder_init_norm": 1e9}, "decoder_init_norm=1000000000.0: use a number above 0"),
    ],
)
def test_so_are_latents_that_are_too_many_or_too_long(changes: dict[str, Any], said: str) -> None:
    sae = training_config_class("batchtopk")(**{"d_in": 32, "d_sae": 64, "k": 4, **changes})
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config(None), sae=sae)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**25])
@pytest.mark.parametrize("name", ["aux_loss_coefficient", "decoder_init_norm"])
def test_so_is_a_number_of_the_sae_that_is_not_finite(name: str, value: float) -> None:
    sae = training_config_class("batchtopk")(d_in=32, d_sae=64, k=4, **{name: value})
    with pytest.raises(ValueError, match=f"{name}=.*: use a finite number below 2.53"):
        dataclasses.replace(config(None), sae=sae)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("split", "memory is open already: leave out split='train'"),
        ("image_column", "memory is open already and has no columns with images: leave out"),
    ],
)
def test_what_has_no_splits_and_columns_refuses_them(part: str, said: str, tmp_path: Path) -> None:
    cfg = config(None, **{part: "train"})
    with pytest.raises(ValueError, match=said):
        runner(cfg)
    with pytest.raises(ValueError, match=f"a store of activations, .*: leave out {part}="):
        runner(cfg, images=store_of(tmp_path / "store"))


def test_images_in_hand_are_no_name() -> None:
    cfg = config(None)
    object.__setattr__(cfg, "images", [object()])  # the annotations are enforced in tests alone
    with pytest.raises(ValueError, match="images= is a list: a configuration names images by a"):
        cfg.__post_init__()


def test_a_buffer_that_would_never_be_full_is_refused() -> None:
    with pytest.raises(ValueError, match="n_batches_in_buffer=99999999: use at most 3,125,000 bat"):
        config(None, n_batches_in_buffer=99_999_999)


def test_a_list_of_images_in_hand_is_opened(tmp_path: Path) -> None:
    held = runner(config(tmp_path / "a"), images=images()).run()
    opened = runner(config(tmp_path / "b"), images=open_images(images())).run()
    assert torch.equal(held.W_dec, opened.W_dec)


def test_a_store_with_the_signature_of_the_whole_clip_is_its_own_still(
    tiny_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signatures once counted the text tower, too; another model's is refused as before."""

    def of_whole(model: Any) -> list[float]:
        matrices = [p for p in model.native.parameters() if p.ndim >= 2]
        step = max(1, len(matrices) // 8)
        return [round(float(p.float().norm()), 4) for p in matrices[::step][:8]]

    model = load_model(tiny_clip)
    monkeypatch.setattr("vision_plugin.activations._making.signature", of_whole)
    extracting = ExtractionConfig(
        model_name=tiny_clip,
        images="demo:4",
        hook_names=["blocks.1.hook_resid_post"],
        output_path=str(tmp_path),
        n_workers=0,
    )
    store = extract(extracting, model=model)
    assert list(store.plan.model.signature) != signature(model)
    sae = training_config_class("batchtopk")(d_in=32, d_sae=64, k=4)
    hook_name = extracting.hook_names[0]
    cfg = dataclasses.replace(config(None), sae=sae, hook_name=hook_name, model_name="x")
    check_store(store, cfg, model)
    other = load_model(tiny_clip)
    with torch.no_grad():
        for parameter in other.native.parameters():
            parameter.mul_(1.5)
    with pytest.raises(StoreMismatchError, match="weights"):
        check_store(store, cfg, other)
