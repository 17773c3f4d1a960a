"""A training step that asks the host for nothing trains the same SAE as SAELens's step.

Without a GPU, the step that a CUDA graph would capture runs as it is, under a mode that raises on
whatever a graph cannot hold. The graph itself is compared where there is a GPU.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from tests._waiting import NoWaiting, WaitedError
from vision_plugin.sae import SteppedTrainer, register
from vision_plugin.sae._device_step import DeviceStep
from vision_plugin.sae._sparse_auxiliary import padded_places
from vision_plugin.sae._trainer import load_trainer_state, trainer_state

D_IN, D_SAE, BATCH, WINDOW = 16, 600, 64, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4.5},
    "matryoshka_batchtopk": {"k": 4.0, "matryoshka_widths": [80, 300, D_SAE]},
}


def _sae(architecture: str, device: str = "cpu", **changes: Any) -> Any:
    register()
    sae_class, config = get_sae_training_class(f"vision_plugin_{architecture}")
    torch.manual_seed(0)
    settings = copy.deepcopy(SETTINGS[architecture]) | changes
    return sae_class(config(d_in=D_IN, d_sae=D_SAE, device=device, **settings))


def _batches() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=generator))
    while True:
        active = torch.rand(BATCH, 40, generator=generator) < 0.1
        yield (torch.rand(BATCH, 40, generator=generator) * active) @ directions


def _trainer(make: Any, sae: Any, device: str = "cpu", steps: int = 30, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "n_checkpoints": 0, "checkpoint_path": None, "save_final_checkpoint": False,
        "total_training_samples": BATCH * steps, "device": device, "autocast": False, "lr": 3e-3,
        "lr_end": 3e-4, "lr_scheduler_name": "constant", "lr_warm_up_steps": 5, "adam_beta1": 0.9,
        "adam_beta2": 0.999, "lr_decay_steps": 5, "n_restart_cycles": 1,
        "train_batch_size_samples": BATCH, "dead_feature_window": WINDOW,
        "feature_sampling_window": 11, "logger": LoggingConfig(log_to_wandb=False),
    }  # fmt: skip
    return make(SAETrainerConfig(**settings | changes), sae, _batches())


def _fixed(architecture: str, *, fused: bool = False, **changes: Any) -> Any:
    """A trainer that takes the steps of a graph on the CPU."""
    trainer = _trainer(SteppedTrainer, _sae(architecture, **changes))
    if fused:
        parameters = trainer.optimizer.param_groups[0]["params"]
        options = {"lr": trainer.cfg.lr, "betas": (0.9, 0.999), "fused": True}
        trainer.optimizer = torch.optim.Adam(parameters, **options)
        trainer.lr_scheduler.optimizer = trainer.optimizer
        for scheduler in getattr(trainer.lr_scheduler, "_schedulers", ()):
            scheduler.optimizer = trainer.optimizer
    trainer.device_step = DeviceStep(trainer, fixed_shapes=True, capture=False)
    return trainer


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}


def _assert_same_bits(first: Any, second: Any) -> None:
    for name, tensor in _weights(second).items():
        assert torch.equal(_weights(first)[name], tensor), name
    assert torch.equal(first.act_freq_scores, second.act_freq_scores)
    assert torch.equal(first.n_forward_passes_since_fired, second.n_forward_passes_since_fired)
    assert first.n_frac_active_samples == second.n_frac_active_samples


@pytest.mark.parametrize("architecture", SETTINGS)
def test_the_step_of_the_device_has_the_bits_of_saelens_step(architecture):
    ours = _trainer(SteppedTrainer, _sae(architecture))
    theirs = _trainer(SAETrainer, _sae(architecture))
    assert ours.device_step is not None
    for _ in range(30):
        for trainer in (ours, theirs):
            trainer.maybe_reset_sparsity()
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
    assert int(theirs.dead_neurons.sum()) > 0, "no latent was dead: AuxK was not tried"
    _assert_same_bits(ours, theirs)


@pytest.mark.parametrize("architecture", SETTINGS)
def test_nothing_in_a_step_of_fixed_shapes_waits_for_the_device(architecture):
    more = {"use_matryoshka_aux_loss": True} if "matryoshka" in architecture else {}
    trainer = _fixed(architecture, fused=True, **more)
    body, revived = trainer.device_step.body, 0

    def watched(sae_in: torch.Tensor) -> Any:
        nonlocal revived
        dead = int(trainer.dead_neurons.sum())
        assert dead <= trainer.sae.dead_capacity, "there is no room for all dead latents"
        with NoWaiting():
            output = body(sae_in)
        revived += bool(dead) and float(output.losses["auxiliary_reconstruction_loss"]) > 0
        return output

    trainer.device_step.body = watched
    trainer.fit()
    assert revived > 5
    assert all(torch.isfinite(p).all() for p in trainer.sae.parameters())


def test_the_mode_raises_on_what_waits():
    theirs = _trainer(SAETrainer, _sae("topk"))
    with pytest.raises(WaitedError, match="waits for the device"), NoWaiting():
        theirs.step(next(theirs.data_provider))


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 1],
    "a mask to write": lambda x: x.clone().__setitem__(x > 1, torch.ones(2)),
    "repeats": lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1])),
    "unique": lambda x: x.unique(),
    "another device": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_mode_raises_on_each_thing_that_waits(name):
    with pytest.raises(WaitedError), NoWaiting():
        WAITS[name](torch.arange(4.0))


@pytest.mark.parametrize("architecture", SETTINGS)
@pytest.mark.parametrize("rescale", [True, False])
def test_fixed_shapes_train_the_same_sae(architecture, rescale):
    more = {"rescale_acts_by_decoder_norm": rescale}
    fixed = _fixed(architecture, **more)
    plain = _trainer(SAETrainer, _sae(architecture, **more))
    for _ in range(20):
        for trainer in (fixed, plain):
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
    assert int(plain.dead_neurons.sum()) > 0
    for name, tensor in _weights(plain).items():
        torch.testing.assert_close(_weights(fixed)[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    assert torch.equal(fixed.act_freq_scores, plain.act_freq_scores)


@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_fused_adam_clips_the_gradients_to_norm_one(size):
    """The first mean of a gradient is a tenth of it, clipped."""
    fused, plain = _fixed("topk", fused=True), _fixed("topk")
    batch = size * next(fused.data_provider)
    means = []
    for trainer in (fused, plain):
        trainer.step(batch.clone())
        means.append([state["exp_avg"] for state in trainer.optimizer.state.values()])
    for found, expected in zip(*means, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    norm = float(torch.cat([10 * mean.flatten() for mean in means[0]]).norm())
    assert norm < 0.5 if size < 1 else abs(norm - 1) < 1e-3


@pytest.mark.parametrize("architecture", SETTINGS)
def test_a_resumed_run_of_fixed_shapes_has_the_same_bits(architecture):
    whole, first, second = (_fixed(architecture) for _ in range(3))
    for step in range(20):
        for trainer in (whole, first if step < 9 else second):
            if step == 9 and trainer is second:
                load_trainer_state(second, copy.deepcopy(trainer_state(first)))
                second.data_provider = first.data_provider
            trainer.maybe_reset_sparsity()
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
    _assert_same_bits(second, whole)


@pytest.mark.parametrize("dead", [[], [0], [3, 4, 9], list(range(10))])
@pytest.mark.parametrize("room", [1, 4, 10])
def test_dead_latents_get_the_first_places_of_a_fixed_number(dead, room):
    mask = torch.zeros(10, dtype=torch.bool)
    mask[dead] = True
    places, fills_up = padded_places(mask, room)
    assert places.shape == fills_up.shape == (room,)
    assert places[~fills_up].tolist() == dead[:room]
    assert ((places >= 0) & (places < 10)).all()


def test_a_run_that_cannot_be_captured_says_why_in_one_sentence(caplog, monkeypatch):
    """The reasons, asked as on a GPU; the trainer itself stays on the CPU."""
    from vision_plugin.sae._device_step import why_not

    register()
    standard = sae_lens.StandardTrainingSAE(
        sae_lens.StandardTrainingSAEConfig(d_in=D_IN, d_sae=32, l1_coefficient=0.1)
    )
    with_term = _sae("topk")
    with_term.loss_terms["mono_loss"] = lambda x, latents: x.sum()
    cases = [
        (standard, {}, "standard trains with SAELens's dense arithmetic"),
        (with_term, {}, "the loss has the term mono_loss"),
        (_sae("topk"), {"target_l0": 3.0}, "target_l0"),
        (_sae("topk"), {"archetypal": object()}, "archetypal_points"),
    ]
    for sae, settings, message in cases:
        reason = why_not(sae, **{"target_l0": None, "archetypal": None} | settings)
        assert reason is not None
        assert message in reason
    assert why_not(_sae("batchtopk"), target_l0=None, archetypal=None) is None

    def refuses(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    monkeypatch.setattr("vision_plugin.sae._device_step._Graph", refuses)
    monkeypatch.setattr("vision_plugin.sae._device_step._on_side_stream", lambda body, x: body(x))
    trainer = _fixed("topk")
    trainer.device_step = DeviceStep(trainer, fixed_shapes=True, capture=True)
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the training step is not captured in a CUDA graph, and runs slower: "
        "operation not permitted when stream is capturing"
    ]
    _assert_same_bits(trainer, _trained("topk"))


def _trained(architecture: str) -> Any:
    trainer = _fixed(architecture)
    trainer.fit()
    return trainer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("architecture", SETTINGS)
def test_a_captured_step_trains_what_the_step_itself_trains(architecture):
    runs = []
    for capture in (True, False):
        trainer = _trainer(SteppedTrainer, _sae(architecture, "cuda"), "cuda")
        trainer.device_step.capture = capture
        trainer.fit()
        runs.append(trainer)
    assert runs[0].device_step._graphs, "no step was captured"
    _assert_same_bits(*runs)
