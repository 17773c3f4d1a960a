"""SAELens's unmodified trainer gets the same SAE from the sparse classes as from its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sae_lens
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from vision_plugin.sae import register
from vision_plugin.sae._sparse_activations import SparseActivations
from vision_plugin.sae._sparse_register import CLASSES, sparse_config

SHARED = Path(__file__).parents[3] / "shared"
D_IN, D_SAE, BATCH = 32, 512, 128

ARCHITECTURES = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 6}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 6.5}),
    "matryoshka_batchtopk": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 6.0, "matryoshka_widths": [64, 200, D_SAE]},
    ),
}


@pytest.fixture(autouse=True)
def _registered():
    register()


def _mixture(n: int, *, seed: int = 0) -> torch.Tensor:
    """Activations made of a few of 64 directions each, with noise; ``[n, 32]``."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(64, D_IN, generator=generator))
    active = torch.rand(n, 64, generator=generator) < 0.06
    strength = torch.rand(n, 64, generator=generator) * active
    return strength @ directions + 0.02 * torch.randn(n, D_IN, generator=generator)


def _pair(architecture: str, **changes):
    """SAELens's SAE and ours, from the same seed and settings."""
    dense_class, dense_config, settings = ARCHITECTURES[architecture]
    sparse_class, sparse_config = get_sae_training_class(f"vision_plugin_{architecture}")
    saes = []
    for sae_class, config_class in ((dense_class, dense_config), (sparse_class, sparse_config)):
        torch.manual_seed(0)
        arguments = {"d_in": D_IN, "d_sae": D_SAE} | settings | changes
        if "matryoshka_widths" in arguments:
            arguments["matryoshka_widths"] = list(arguments["matryoshka_widths"])
        saes.append(sae_class(config_class(**arguments)))
    return saes


def _train(sae, data: torch.Tensor, *, steps: int, dead_feature_window: int = 20) -> SAETrainer:
    def batches():
        generator = torch.Generator().manual_seed(1)
        while True:
            rows = torch.randint(len(data), (BATCH,), generator=generator)
            yield data[rows].to(sae.dtype)

    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        total_training_samples=BATCH * steps, device="cpu", autocast=False, lr=3e-4, lr_end=3e-5,
        lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
        lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=BATCH,
        dead_feature_window=dead_feature_window, feature_sampling_window=100,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(config, sae, batches())
    trainer.fit()
    return trainer


def _l0(trainer: SAETrainer) -> float:
    return float(trainer.feature_sparsity.sum())


def _explained_variance(sae, data: torch.Tensor) -> float:
    with torch.no_grad():
        left = (sae(data) - data).pow(2).sum()
        return float(1 - left / (data - data.mean(0)).pow(2).sum())


def _largest_difference(first, second) -> float:
    theirs = second.state_dict()
    return max(
        float((tensor - theirs[name]).abs().max())
        for name, tensor in first.state_dict().items()
        if name != "topk_threshold"
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("rescale", "centre"), [(True, True), (False, False)])
def test_200_steps_give_the_same_sae_with_dead_latents_revived(architecture, rescale, centre):
    changes = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": centre}
    if architecture == "matryoshka_batchtopk":
        changes["use_matryoshka_aux_loss"] = centre
    data = _mixture(5000)
    dense, sparse = _pair(architecture, dtype="float64", **changes)
    expected = _train(dense, data, steps=200)
    found = _train(sparse, data, steps=200)
    assert expected.dead_neurons.any(), "no latent died: the auxiliary loss was not exercised"
    assert _largest_difference(sparse, dense) < 1e-5
    assert torch.equal(found.dead_neurons, expected.dead_neurons)
    assert _l0(found) == pytest.approx(_l0(expected), rel=1e-4)
    assert _explained_variance(sparse, data) == pytest.approx(
        _explained_variance(dense, data), abs=1e-4
    )


@pytest.fixture(scope="module")
def emoji_activations() -> torch.Tensor:
    """Patch activations of a CLIP vision tower over real images, ``[n, 192]``, unit scale."""
    model_folder, images = SHARED / "models" / "emoji-clip", SHARED / "data" / "noto.parquet"
    if not model_folder.is_dir() or not images.is_file():
        pytest.skip(f"no real activations: {model_folder} or {images} is missing")
    import datasets
    from PIL import Image
    from transformers import AutoProcessor, CLIPVisionModel

    rows = datasets.load_dataset("parquet", data_files=str(images), split="train[:160]")
    images = []
    for image in rows["image"]:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        images.append(canvas.convert("RGB"))
    pixels = AutoProcessor.from_pretrained(model_folder)(images=images, return_tensors="pt")
    model = CLIPVisionModel.from_pretrained(model_folder).eval()
    with torch.no_grad():
        states = model(pixels["pixel_values"], output_hidden_states=True).hidden_states[4]
    flat = states.reshape(-1, states.shape[-1])
    return flat / flat.norm(dim=1).mean()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_200_steps_on_real_activations_give_the_same_sae(architecture, emoji_activations):
    # In float64: in float32 a rounding now and then flips which of two latents is selected.
    dense, sparse = _pair(architecture, d_in=emoji_activations.shape[1], dtype="float64")
    expected = _train(dense, emoji_activations, steps=200)
    found = _train(sparse, emoji_activations, steps=200)
    assert expected.dead_neurons.any(), "no latent died: the auxiliary loss was not exercised"
    assert _largest_difference(sparse, dense) < 1e-5
    assert _l0(found) == pytest.approx(_l0(expected), rel=1e-4)
    data = emoji_activations.double()
    assert _explained_variance(sparse, data) == pytest.approx(
        _explained_variance(dense, data), abs=1e-4
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("n_dead", [0, 3, 200, 500])
def test_one_steps_losses_and_gradients_are_the_hosts(architecture, n_dead, monkeypatch):
    from vision_plugin.sae import _sparse_auxiliary

    # Both ways of computing the auxiliary loss: plain products for few candidates, and gathers.
    monkeypatch.setattr(_sparse_auxiliary, "_DENSE_RATIO", 16 if n_dead == 200 else 4)
    dense, sparse = _pair(architecture, dtype="float64")
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))[:n_dead]] = True
    x = _mixture(BATCH).double()
    outputs = []
    for sae in (dense, sparse):
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0,
                is_logging_step=False,
            )
        )  # fmt: skip
        output.loss.backward()
        outputs.append(output)
    assert outputs[0].losses.keys() == outputs[1].losses.keys()
    for name, expected in outputs[0].losses.items():
        torch.testing.assert_close(outputs[1].losses[name], expected)
    torch.testing.assert_close(outputs[1].sae_out, outputs[0].sae_out)
    torch.testing.assert_close(outputs[1].feature_acts.to_dense() + 0, outputs[0].feature_acts)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(sparse.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_saves_as_the_stock_architecture_and_loads_without_us(architecture, tmp_path):
    data = _mixture(2000)
    dense, sparse = _pair(architecture)
    _train(dense, data, steps=5)
    _train(sparse, data, steps=5)
    dense.save_inference_model(tmp_path / "dense")
    sparse.save_inference_model(tmp_path / "sparse")
    config = json.loads((tmp_path / "sparse" / "cfg.json").read_text())
    assert config["architecture"] == ("topk" if architecture == "topk" else "jumprelu")
    ours = [name for name in SAE_TRAINING_CLASS_REGISTRY if name.startswith("vision_plugin")]
    taken = {name: SAE_TRAINING_CLASS_REGISTRY.pop(name) for name in ours}
    try:
        loaded = SAE.load_from_disk(tmp_path / "sparse")
    finally:
        SAE_TRAINING_CLASS_REGISTRY.update(taken)
    expected = SAE.load_from_disk(tmp_path / "dense")
    assert type(loaded) is type(expected)
    assert type(loaded).__module__.startswith("sae_lens")
    torch.testing.assert_close(loaded(data), expected(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_checkpoint_loads_back_with_its_layout(architecture, tmp_path):
    _, sparse = _pair(architecture)
    sparse.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sparse)
    assert loaded.cfg.to_dict() == sparse.cfg.to_dict()
    assert loaded.W_enc.t().is_contiguous()
    torch.manual_seed(5)
    other = type(sparse)(sparse.cfg)
    other.load_weights_from_checkpoint(tmp_path)
    assert other.W_enc.t().is_contiguous()
    assert _largest_difference(other, sparse) == 0 == _largest_difference(loaded, sparse)


def test_gradients_arrive_in_the_parameters_own_layout():
    _, sparse = _pair("topk")
    x = _mixture(BATCH)
    step = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    sparse.training_forward_pass(step).loss.backward()
    assert sparse.W_enc.grad.stride() == sparse.W_enc.stride()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dead_capacity", [None, 16])
def test_dead_latents_add_no_gradient_of_the_size_of_the_weights(architecture, dead_capacity):
    from benchmarks._live_memory import peak_bytes

    levels = architecture == "matryoshka_batchtopk"
    more = {"use_matryoshka_aux_loss": True} if levels else {}
    _, sae = _pair(architecture, d_in=512, **more)
    sae.dead_capacity = dead_capacity
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::50] = True

    def step() -> None:
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=torch.ones(16, 512), coefficients={}, dead_neuron_mask=dead,
                n_training_steps=0, is_logging_step=False,
            )
        )  # fmt: skip
        output.loss.backward()

    peak = peak_bytes(step)
    assert float(sae.W_enc.grad.t()[dead].norm()) > 0
    gradients = sum(p.grad.nbytes for p in sae.parameters())
    assert gradients < peak < 1.4 * gradients  # a second gradient of one weight is a half more


def test_a_hook_on_the_latents_is_honoured_by_the_hosts_own_step():
    dense, sparse = _pair("topk")
    outputs = []
    for sae in (dense, sparse):
        sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 0.5)
        outputs.append(
            sae.training_forward_pass(
                TrainStepInput(
                    sae_in=_mixture(BATCH), coefficients={}, dead_neuron_mask=None,
                    n_training_steps=0, is_logging_step=False,
                )
            )
        )  # fmt: skip
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(outputs[1].sae_out, outputs[0].sae_out)


def test_registering_twice_changes_nothing_and_a_taken_name_is_an_error(monkeypatch):
    before = dict(SAE_TRAINING_CLASS_REGISTRY)
    register()
    assert before == SAE_TRAINING_CLASS_REGISTRY
    other = (TopKTrainingSAE, TopKTrainingSAEConfig)
    monkeypatch.setitem(SAE_TRAINING_CLASS_REGISTRY, "vision_plugin_topk", other)
    with pytest.raises(ValueError, match="vision_plugin_topk already registered"):
        register()


def test_the_configurations_have_the_hosts_fields_and_defaults():
    for (_, config), (_, stock, settings) in zip(CLASSES, ARCHITECTURES.values(), strict=True):
        assert [field.name for field in dataclasses.fields(config)] == [
            field.name for field in dataclasses.fields(stock)
        ]
        ours = config(d_in=4, d_sae=D_SAE, **settings).to_dict()
        theirs = stock(d_in=4, d_sae=D_SAE, **settings).to_dict()
        for name in ("architecture", "metadata"):
            ours.pop(name)
            theirs.pop(name)
        assert ours == theirs


def test_a_stock_configuration_turns_into_its_sparse_counterpart():
    for (_, config), (_, stock, settings) in zip(CLASSES, ARCHITECTURES.values(), strict=True):
        given = stock(d_in=4, d_sae=D_SAE, normalize_activations="layer_norm", **settings)
        found = sparse_config(given)
        assert type(found) is config
        assert found.normalize_activations == "layer_norm"
        assert found.k == settings["k"]
        assert found.metadata.training_architecture == stock.architecture()
        assert given.metadata.training_architecture == stock.architecture()
        assert sparse_config(found) is found
    other = sae_lens.StandardTrainingSAEConfig(d_in=4, d_sae=8)
    assert sparse_config(other) is other


def test_the_reported_activations_act_as_the_dense_tensor():
    _, sparse = _pair("batchtopk")
    step = TrainStepInput(
        sae_in=_mixture(BATCH), coefficients={}, dead_neuron_mask=None, n_training_steps=0,
        is_logging_step=True,
    )  # fmt: skip
    acts = sparse.training_forward_pass(step).feature_acts
    dense = acts + 0
    assert isinstance(acts, SparseActivations)
    assert type(dense) is torch.Tensor
    firing = acts.bool().float()
    assert isinstance(firing, SparseActivations), "the cast became dense"
    for dim in (0, 1, -1, -2):
        torch.testing.assert_close(firing.sum(dim), dense.bool().float().sum(dim))
        assert torch.equal(acts.bool().sum(dim), dense.bool().sum(dim))
    assert torch.equal(acts > 0, dense > 0)
    torch.testing.assert_close(acts.sum(), dense.sum())
    torch.testing.assert_close(acts @ sparse.W_dec, dense @ sparse.W_dec)
    assert acts.detach().max() == dense.max()


def _step(sae, x, *, dead=None):
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0,
            is_logging_step=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", ["feature_acts", "hidden_pre"])
def test_what_is_written_to_the_reported_activations_stays_written(name):
    _, sparse = _pair("batchtopk")
    acts = getattr(_step(sparse, _mixture(BATCH)), name)
    expected = acts.clone()
    for write in (
        lambda acts: acts.mul_(2),
        lambda acts: acts[0].fill_(7),
        lambda acts: acts.__setitem__((slice(2, 4), 5), 3.0),
        lambda acts: acts.view(-1)[-3:].copy_(torch.arange(3.0)),
        lambda acts: acts.T[9].add_(1),
        lambda acts: acts.detach().clamp_(max=5),
        lambda acts: acts[acts > 4].zero_(),  # of a copy, as ever
        lambda acts: acts.masked_fill_(acts > 4, -1),
        lambda acts: torch.add(acts, 1, out=acts),
    ):
        write(acts)
        write(expected)
        assert torch.equal(acts + 0, expected)
    assert acts.zero_() is acts
    assert not bool(acts.bool().float().sum(-1).any())
    assert not bool(acts.detach().bool().sum(0).any())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lead", [(4, 32), (2, 1, 64), ()])
def test_a_step_takes_any_axes_before_the_last_as_the_hosts_does(architecture, lead):
    dense, sparse = _pair(architecture, dtype="float64")
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::5] = True
    x = _mixture(BATCH).double()[: torch.Size(lead).numel()]
    flat, shaped = _step(sparse, x, dead=dead), _step(sparse, x.view(*lead, D_IN), dead=dead)
    assert shaped.sae_out.shape == (*lead, D_IN)
    assert shaped.feature_acts.shape == shaped.hidden_pre.shape == (*lead, D_SAE)
    torch.testing.assert_close(shaped.sae_out, flat.sae_out.view(*lead, D_IN))
    torch.testing.assert_close(shaped.feature_acts + 0, (flat.feature_acts + 0).view(*lead, D_SAE))
    for axis in range(len(lead)):
        found = shaped.feature_acts.bool().float().sum(axis)
        torch.testing.assert_close(found, (shaped.feature_acts + 0).bool().float().sum(axis))
    if architecture == "matryoshka_batchtopk" or not lead:
        expected = flat  # SAELens's Matryoshka takes apart the second axis
    else:
        expected = _step(dense, x.view(*lead, D_IN), dead=dead)
    assert shaped.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        torch.testing.assert_close(shaped.losses[name], loss)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("n_dead", [0, 3, 400])
def test_a_step_on_heads_is_the_hosts(architecture, n_dead):
    dense, sparse = _pair(architecture, dtype="float64")
    for sae in (dense, sparse):
        sae.turn_on_forward_pass_hook_z_reshaping()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:n_dead] = True
    x = _mixture(BATCH).double().view(BATCH, 4, D_IN // 4)
    expected, found = _step(dense, x, dead=dead), _step(sparse, x, dead=dead)
    torch.testing.assert_close(found.sae_out, expected.sae_out)
    torch.testing.assert_close(found.feature_acts + 0, expected.feature_acts)
    for name, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[name], loss)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_on_nan_has_the_loss_nan_as_the_hosts_has(architecture):
    dense, sparse = _pair(architecture)
    for sae in (dense, sparse):
        sae.b_enc.data[17] = torch.nan
    expected, found = (_step(sae, _mixture(BATCH)) for sae in (dense, sparse))
    assert bool(expected.loss.isnan())
    for name, loss in expected.losses.items():
        assert bool(found.losses[name].isnan()) == bool(loss.isnan()), name
    assert bool(found.loss.isnan())
    assert bool(found.feature_acts[:, 17].isnan().all())


@pytest.mark.slow
def test_a_step_without_dead_latents_compiles_to_one_graph():
    done = subprocess.run(
        [sys.executable, "-m", "tests.sae.compiled_step"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(
        (config.architecture() for _, config in CLASSES), "ok"
    )


@pytest.mark.parametrize("values", [[], [-1.0, 0.0], [0.5, 0.0, 2.0], [float("nan"), 3.0]])
def test_the_threshold_moves_as_the_hosts_does(values):
    dense, sparse = _pair("batchtopk", topk_threshold_lr=0.3)
    for sae in (dense, sparse):
        for _ in range(3):
            sae.update_topk_threshold(torch.tensor(values))
    assert torch.equal(sparse.topk_threshold, dense.topk_threshold)


def test_terms_that_are_added_to_a_step_take_any_axes_too():
    from vision_plugin.sae._monosemantic import reward_monosemanticity
    from vision_plugin.sae._terms import revive_dead

    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:50] = True
    x = _mixture(BATCH)
    standard = sae_lens.StandardTrainingSAE(
        sae_lens.StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE)
    )
    revive_dead(standard)
    for sae in (standard, _pair("topk")[1]):
        reward_monosemanticity(sae, 1e-3)
        losses = []
        for given in (x, x.view(4, 32, D_IN)):
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=given, coefficients={"l1": 1.0}, dead_neuron_mask=dead,
                    n_training_steps=0, is_logging_step=False,
                )
            )  # fmt: skip
            losses.append(output.losses)
        assert "mono_loss" in losses[0]
        for name, loss in losses[0].items():
            torch.testing.assert_close(losses[1][name], loss)


def test_autocast_trains_and_stays_near_the_hosts_loss():
    dense, sparse = _pair("topk")
    losses = []
    for sae in (dense, sparse):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step = TrainStepInput(
                sae_in=_mixture(BATCH), coefficients={}, dead_neuron_mask=None, n_training_steps=0,
                is_logging_step=False,
            )  # fmt: skip
            output = sae.training_forward_pass(step)
        output.loss.backward()
        losses.append(output.loss.item())
        assert sae.W_enc.grad.dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_sae_lens_exports_what_these_classes_stand_in_for():
    for stock, config, _ in ARCHITECTURES.values():
        assert getattr(sae_lens, stock.__name__) is stock
        assert getattr(sae_lens, config.__name__) is config
