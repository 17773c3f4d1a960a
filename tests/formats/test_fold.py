"""Exact folds: input statistics, batch norm, gates, inclusive thresholds; checked in float64."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.formats.test_samples import DATA, EXACT, expected, options_of
from vision_plugin.formats import CorruptCheckpointError, RefusedCheckpointError, load_sae

PLAIN_INPUT = [
    name
    for name in EXACT
    if not name.startswith("prisma") or "nonorm" in name  # the others normalise each sample
]
STATISTICS = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", PLAIN_INPUT)
@STATISTICS
@given(seed=st.integers(0, 1000), scalar=st.booleans())
def test_folded_statistics_equal_standardising_by_hand(name: str, seed: int, scalar: bool) -> None:
    """Latents of raw activations equal the latents of `(a - mean) / std`; the output maps back."""
    numbers = expected(name)
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(32, generator=generator, dtype=torch.float64)
    std = torch.rand(32, generator=generator, dtype=torch.float64) * 3 + 0.5
    scale: Any = float(std[0]) if scalar else std
    raw = numbers["x"].double() * scale + mean

    options = options_of(name)
    sae = load_sae(DATA / name, input_mean=mean, input_std=scale, dtype="float64", **options)

    latents = sae.encode(raw)
    torch.testing.assert_close(latents, numbers["latents"].double(), rtol=0, atol=1e-5)
    recon = sae.decode(latents)
    torch.testing.assert_close(recon, numbers["recon"].double() * scale + mean, rtol=0, atol=1e-4)
    assert sae.cfg.metadata.input_normalization == "standardize (folded)"


@pytest.mark.parametrize("name", ["prisma-relu-hub", "prisma-relu-constnorm-hub"])
def test_statistics_do_not_fold_in_front_of_a_per_sample_norm(name: str) -> None:
    with pytest.raises(RefusedCheckpointError, match="every sample"):
        load_sae(DATA / name, input_mean=torch.zeros(32), input_std=1.0)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (torch.zeros(31), 1.0),
        (torch.full((32,), torch.nan), 1.0),
        (torch.zeros(32), 0.0),
        (torch.zeros(32), -torch.ones(32)),
        (torch.zeros(32), float("inf")),
    ],
)
def test_statistics_that_cannot_be_are_named(mean: torch.Tensor, std: Any) -> None:
    with pytest.raises(ValueError, match=r"input_(mean|std)"):
        load_sae(DATA / "visaebench-topk", input_mean=mean, input_std=std)
    with pytest.raises(ValueError, match="belong together"):
        load_sae(DATA / "visaebench-topk", input_mean=mean)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("threshold", [0.75, 1e-3, 0.0, 3.0])
def test_a_latent_at_its_inclusive_threshold_is_kept(
    dtype: str, threshold: float, tmp_path: Path
) -> None:
    """overcomplete keeps `z >= threshold`; SAELens keeps `>`. On the boundary they still agree."""
    state = OrderedDict(
        {
            "encoder.final_block.0.weight": torch.eye(3),
            "encoder.final_block.0.bias": torch.zeros(3),
            "dictionary._weights": torch.eye(3),
        }
    )
    torch.save(state, tmp_path / "state_dict.pth")
    sae = load_sae(tmp_path, activation="batchtopk", threshold=threshold, dtype=dtype)

    at = torch.tensor(threshold, dtype=torch.float32).to(sae.W_enc.dtype)  # as the library has it
    below = at * 0.98
    latents = sae.encode(torch.stack([at, below, at * 1.02])[None])[0]

    assert latents.tolist() == [at, below if at == 0 else 0.0, at * 1.02]


def test_a_gated_dictionary_learning_sae_equals_its_formula(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = OrderedDict(
        {
            "decoder_bias": torch.randn(8),
            "encoder.weight": torch.randn(24, 8),
            "decoder.weight": torch.randn(8, 24),
            "r_mag": torch.randn(24) * 0.3,
            "gate_bias": torch.randn(24),
            "mag_bias": torch.randn(24),
        }
    )
    torch.save(state, tmp_path / "ae.pt")
    sae = load_sae(tmp_path)
    assert type(sae) is sae_lens.GatedSAE

    x = torch.randn(64, 8)
    wide = {key: value.double() for key, value in state.items()}
    encoded = (x.double() - wide["decoder_bias"]) @ wide["encoder.weight"].T
    gate = (encoded + wide["gate_bias"] > 0).double()
    latents = gate * (wide["r_mag"].exp() * encoded + wide["mag_bias"]).relu()
    recon = latents @ wide["decoder.weight"].T + wide["decoder_bias"]
    torch.testing.assert_close(sae.encode(x).double(), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(sae(x).double(), recon, rtol=0, atol=1e-4)


def test_an_autoencoder_with_an_unnormalised_decoder_is_scaled_as_its_loader_scales_it(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    state = OrderedDict(
        {
            "bias": torch.randn(8),
            "encoder.weight": torch.randn(24, 8),
            "encoder.bias": torch.randn(24),
            "decoder.weight": torch.randn(8, 24),
        }
    )
    torch.save(state, tmp_path / "ae.pt")
    sae = load_sae(tmp_path)
    x = torch.randn(64, 8)
    pre = (x - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"]
    norms = state["decoder.weight"].norm(dim=0)
    torch.testing.assert_close(sae.encode(x), pre.relu() * norms, rtol=1e-5, atol=1e-5)
    recon = pre.relu() @ state["decoder.weight"].T + state["bias"]
    torch.testing.assert_close(sae(x), recon, rtol=1e-5, atol=1e-4)


def test_a_threshold_that_was_never_set_is_plain_relu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.load(DATA / "dl-batchtopk" / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    sae = load_sae(tmp_path, activation="batchtopk")
    x = expected("dl-batchtopk")["x"]
    pre = (x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]
    torch.testing.assert_close(sae.encode(x), pre.relu(), rtol=0, atol=1e-5)
    assert "not set in training" in caplog.text


@pytest.mark.parametrize("norm", ["l2", "max_l2", "l1", "max_l1", "identity"])
def test_every_row_normalisation_of_overcomplete_is_known(norm: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 4).double()
    state = OrderedDict(
        {
            "encoder.final_block.0.weight": torch.randn(6, 4),
            "encoder.final_block.0.bias": torch.zeros(6),
            "dictionary._weights": rows.float(),
            "dictionary.multiplier": torch.tensor(0.4),
        }
    )
    torch.save(state, tmp_path / "state_dict.pth")
    sae = load_sae(tmp_path, activation="relu", row_normalization=norm)
    order = 1 if norm.endswith("l1") else 2
    norms = rows.norm(p=order, dim=1, keepdim=True)
    divisor = {"i": torch.ones(1).double(), "m": norms.max()}.get(norm[0], norms)
    torch.testing.assert_close(
        sae.W_dec.double(), rows / divisor * torch.tensor(0.4).double().exp(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["encoder.mlp_blocks.0.0.weight", "encoder.final_block.1.weight"])
def test_an_overcomplete_encoder_that_is_not_linear_is_refused(name: str, tmp_path: Path) -> None:
    state = torch.load(DATA / "overcomplete-vanilla" / "state_dict.pth", weights_only=True)
    torch.save(state | {name: torch.ones(96)}, tmp_path / "state_dict.pth")
    with pytest.raises(RefusedCheckpointError, match=r"hidden layers|layer norm"):
        load_sae(tmp_path, activation="relu")


def test_thresholds_of_which_two_readers_disagree_are_refused(tmp_path: Path) -> None:
    weights = (DATA / "overcomplete-jump" / "state_dict.pth").read_bytes()
    (tmp_path / "sae.pt").write_bytes(weights)
    (tmp_path / "config.json").write_text('{"activation": "jumprelu"}')
    with pytest.raises(RefusedCheckpointError, match="format='overcomplete'"):
        load_sae(tmp_path)
    numbers = expected("overcomplete-jump")
    sae = load_sae(tmp_path, format="overcomplete")
    torch.testing.assert_close(sae.encode(numbers["x"]), numbers["latents"], rtol=0, atol=1e-5)


def test_a_config_of_another_checkpoint_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes((DATA / "dl-topk" / "ae.pt").read_bytes())
    config = (DATA / "dl-topk" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"dict_size": 96', '"dict_size": 97'))
    with pytest.raises(CorruptCheckpointError, match="d_sae=97"):
        load_sae(tmp_path)


@pytest.mark.slow
def test_a_converted_sae_needs_nothing_of_ours(tmp_path: Path) -> None:
    sae = load_sae(DATA / "prisma-gated-pt")
    sae.save_model(tmp_path / "sae")
    torch.save({"x": expected("prisma-gated-pt")["x"]}, tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['vision_plugin'] = None; import torch; from sae_lens import SAE; "
        f"sae = SAE.load_from_disk({str(tmp_path / 'sae')!r}); "
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)['x']; "
        f"torch.save(sae.encode(x).detach(), {str(tmp_path / 'z.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    latents = torch.load(tmp_path / "z.pt", weights_only=True)
    torch.testing.assert_close(latents, expected("prisma-gated-pt")["latents"], rtol=0, atol=1e-5)
