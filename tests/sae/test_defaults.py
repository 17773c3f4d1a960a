"""Settings that follow from the data and the run: decided early, shown, saved, overridable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAE

from tests.activations.conftest import one_thread
from tests.sae._runs import (
    ARCHITECTURES,
    BATCH,
    SHAPE,
    STEPS,
    Killed,
    config,
    kill,
    runner,
    stop_at,
    weights,
)
from vision_plugin.cli import main
from vision_plugin.cli._train import read_config
from vision_plugin.sae import SAE_FIELDS, VisionSAERunnerConfig

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

OPEN: dict[str, Any] = {
    **{"defaults": "auto", "lr": "auto", "lr_warm_up_steps": "auto", "lr_decay_steps": "auto"},
    "dead_feature_window": "auto",
}
"""What ``config`` of the other tests sets, left open."""
PLACES = "--model-name m --images i --hook-name h --d-sae 32"


def left_open(path: Path | None, architecture: str = "batchtopk", **changes: Any):
    """A run of 24 steps in which everything that can be decided is."""
    return config(path, architecture, **{**OPEN, **changes})


@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_everything_left_open_is_decided_before_the_first_step(architecture: str) -> None:
    run = runner(left_open(None, architecture))
    settings = dataclasses.asdict(dataclasses.replace(run.cfg, sae=run.cfg.sae))
    assert "auto" not in [value for name, value in settings.items() if name != "defaults"]
    decided = run.cfg.sae.metadata.to_dict()["auto"]
    for name, value in decided.items():
        owner = run.cfg if hasattr(run.cfg, name) and name in settings else run.cfg.sae
        assert getattr(owner, name) == value
    assert f"lr {decided['lr']:g}" in run.decided()
    assert run.cfg.lr_warm_up_steps == round(0.1 * STEPS)
    assert run.cfg.sae.decoder_init_norm == 1.0


def test_what_was_decided_is_saved_and_decides_the_same_again(tmp_path: Path) -> None:
    first = runner(left_open(tmp_path / "first"))
    first.run()
    saved = json.loads((tmp_path / "first" / "runner_cfg.json").read_text())
    metadata = json.loads((tmp_path / "first" / "cfg.json").read_text())["metadata"]
    assert metadata["auto"]["lr"] == saved["lr"] == first.cfg.lr
    again = VisionSAERunnerConfig.from_dict({**saved, "output_path": str(tmp_path / "again")})
    assert runner(again).cfg == again
    runner(again).run()
    assert weights(tmp_path / "again") == weights(tmp_path / "first")


def test_a_configuration_that_is_passed_in_stays_as_it_is() -> None:
    cfg = left_open(None)
    before = json.dumps(cfg.to_dict(), default=str)
    runner(cfg)
    assert json.dumps(cfg.to_dict(), default=str) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", 1e-3), ("lr_warm_up_steps", 1), ("lr_decay_steps", 2), ("dead_feature_window", 3)),
        *(("b_dec_init_method", "zeros"), ("encoder_lr_ratio", 1.0), ("fit_threshold", False)),
    ],
)
def test_each_can_be_set_otherwise(name: str, value: Any) -> None:
    cfg = runner(left_open(None, **{name: value})).cfg
    assert getattr(cfg, name) == value
    assert name not in cfg.sae.metadata.to_dict()["auto"]


def test_a_field_of_the_sae_keeps_sae_lens_s_value_where_it_is_named() -> None:
    sae = sae_lens.BatchTopKTrainingSAEConfig(**SHAPE)
    assert runner(left_open(None, sae=sae)).cfg.sae.k == 4  # sqrt(16)
    sae = sae_lens.BatchTopKTrainingSAEConfig(d_in=16, d_sae=128)
    kept = runner(left_open(None, sae=sae, explicit=("k", "decoder_init_norm"))).cfg.sae
    assert (kept.k, kept.decoder_init_norm) == (100, 0.1)
    with pytest.raises(ValueError, match="explicit names 'kk', but batchtopk has no such field"):
        left_open(None, explicit=("kk",))


def test_a_flag_counts_as_set_whatever_its_value() -> None:
    line = f"{PLACES} --decoder-init-norm 0.1"
    assert read_config(line.split()).explicit == ("d_sae", "decoder_init_norm")


def test_sae_lens_s_own_defaults_are_one_flag_away() -> None:
    line = f"{PLACES.replace('32', '128')} --defaults saelens"
    open_sae = sae_lens.BatchTopKTrainingSAEConfig(d_in=16, d_sae=128)
    cfg = dataclasses.replace(
        read_config(line.split()),
        sae=open_sae,
        explicit=(),
        training_tokens=10_000,
        output_path=None,
    )
    found = runner(dataclasses.replace(cfg, hook_name=config(None).hook_name)).cfg
    assert found.sae == open_sae
    theirs = sae_lens.LanguageModelSAERunnerConfig(sae=open_sae, hook_name="h")
    assert found.train_batch_size_tokens == theirs.train_batch_size_tokens
    for name in ("lr", "lr_warm_up_steps", "lr_decay_steps", "dead_feature_window"):
        assert getattr(found, name) == getattr(theirs, name), name


def test_a_matryoshka_has_four_nested_widths_unless_told_otherwise() -> None:
    sae = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(d_in=16, d_sae=64)
    assert runner(left_open(None, sae=sae)).cfg.sae.matryoshka_widths == [4, 16, 44, 64]


def test_an_sae_without_a_width_is_eight_times_as_wide_as_the_activations() -> None:
    sae = sae_lens.TopKTrainingSAEConfig(d_in=0, d_sae=0)
    assert runner(left_open(None, sae=sae)).cfg.sae.d_sae == 8 * 16


def test_the_batch_makes_a_thousand_steps_where_it_can() -> None:
    sizes = {}
    for tokens in (100, 30_000, 1_200_000, 100_000_000):
        cfg = left_open(None, training_tokens=tokens, train_batch_size_tokens="auto")
        sizes[tokens] = (cfg.batch_size, cfg.total_training_steps)
    assert sizes[100] == (100, 1)
    assert sizes[30_000][0] == 256
    assert sizes[1_200_000] == (1024, 1172)
    assert sizes[100_000_000][0] == 4096


BAD = {
    "lr_warm_up_steps": (
        20,
        {"lr_decay_steps": 8},
        r"do not fit into a run of 24 steps: use 2 and 5",
    ),
    "dead_feature_window": (1000, {}, r"dead_feature_window=1000 .* 24 steps.*Use 1"),
    "lr": (3.0, {}, r"lr=3 is too high for 32 latents.*Use 0.004"),
}


BAD_SAE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "more latents active than there are": (
        *("topk", {"k": 33}, {}),
        r"k=33 does not fit d_sae=32.*Use 4, or a larger d_sae",
    ),
    "more on average": ("batchtopk", {"k": 32.5}, {}, r"k=32.5 does not fit d_sae=32.*Use 4"),
    "none": ("topk", {"k": 0}, {}, "k=0: it has to be above 0"),
    "SAELens's k": (*("topk", {"k": 100}, {"defaults": "saelens"}), "k=100 does not fit d_sae=32"),
    "a target": ("standard", {}, {"target_l0": 40.0}, r"target_l0=40.0 does not fit .*Use 4"),
    "no width": ("topk", {"d_sae": 0}, {"explicit": ("d_sae",)}, r"d_sae=0: .* above 0.* 8 times"),
    "a negative width": ("topk", {"d_sae": -5}, {}, "d_sae=-5: it has to be above 0"),
    "a prefix that is too wide": (
        *("matryoshka_batchtopk", {"k": 4.0, "matryoshka_widths": [8, 64]}, {}),
        r"matryoshka_widths=\[8, 64\] do not fit d_sae=32.*use \[2, 8, 22, 32\]",
    ),
    "prefixes that shrink": (
        *("matryoshka_batchtopk", {"k": 4.0, "matryoshka_widths": [16, 8, 32]}, {}),
        "have to be above 0 and to increase",
    ),
    "an unknown type": (
        *("topk", {"k": 4}, {"dtype": "float33"}),
        "dtype='float33': use float32, bfloat16, float16, float64",
    ),
    "an unknown schedule": (
        *("topk", {"k": 4}, {"lr_scheduler_name": "sawtooth"}),
        "lr_scheduler_name='sawtooth': use constant, cosine",
    ),
    "no restarts": ("topk", {"k": 4}, {"n_restart_cycles": 0}, "n_restart_cycles=0: .* above 0"),
    "no buffer": ("topk", {"k": 4}, {"n_batches_in_buffer": 0}, "n_batches_in_buffer=0"),
}


@pytest.mark.parametrize("name", BAD_SAE)
def test_an_sae_that_cannot_be_trained_is_a_sentence_before_anything_is_opened(name: str) -> None:
    architecture, inside, others, message = BAD_SAE[name]
    sae = type(ARCHITECTURES[architecture]())(**{"d_in": 16, "d_sae": 32, **inside})
    with pytest.raises(ValueError, match=message):
        left_open(None, architecture, **{"sae": sae, **others})


BAD_LINES = {
    "--d-sae 0": "--d-sae 0: it has to be above 0",
    "--d-sae 32 --dtype float33": "--dtype 'float33': use float32",
    "--d-sae 32 --architecture topk --k 64": "--k 64 does not fit --d-sae 32",
    "--d-sae 32 --k 32.5": "--k 32.5 does not fit --d-sae 32",
    "--d-sae 32 --images demo:2 --model-name demo --hook-name blocks.1.hook_resid_post "
    "--training-tokens 64 --train-batch-size-tokens 32 --lr-decay-steps 9": (
        "--lr-warm-up-steps 0 and --lr-decay-steps 9 do not fit into a run of 2 steps"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_command_line_that_cannot_be_trained_is_one_sentence(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = PLACES.removesuffix(" --d-sae 32").split()
    out = tmp_path / "sae"
    assert main(["train", *places, *line.split(), "--output-path", str(out)]) != 0
    said = capsys.readouterr().err.splitlines()
    assert BAD_LINES[line] in said[-1]
    assert [text for text in said if text.startswith("vision-plugin train: ")] == said[-1:]
    assert list(tmp_path.iterdir()) == []


def test_more_restarts_than_steps_between_warm_up_and_decay_are_refused() -> None:
    changes = {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 30}
    with pytest.raises(ValueError, match=r"17 steps between .* n_restart_cycles=30.*24 steps"):
        runner(left_open(None, **changes))


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_the_run_is_a_sentence_with_a_value_that_does(name: str) -> None:
    value, others, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        runner(left_open(None, **{name: value}, **others))


def test_a_penalty_that_never_has_its_weight_is_refused() -> None:
    sae = sae_lens.StandardTrainingSAEConfig(**SHAPE, l1_coefficient=2.0, l1_warm_up_steps=500)
    with pytest.raises(ValueError, match=r"l1_warm_up_steps=500 does not fit.*24 steps.*use 2"):
        runner(left_open(None, sae=sae))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        sae_lens.StandardTrainingSAEConfig,
        sae_lens.GatedTrainingSAEConfig,
        sae_lens.JumpReLUTrainingSAEConfig,
    ],
)
def test_the_penalty_s_weight_follows_the_latents_that_are_asked_for(make: Any) -> None:
    found = []
    for target in (4.0, 28.0):
        sae = make(d_in=16, d_sae=64)
        run = runner(left_open(None, sae=sae, target_l0=target, training_tokens=120 * BATCH))
        run.run()
        assert run.quality is not None
        found.append(run.quality.l0)
    few, many = found
    assert few < 0.8 * many


def test_a_weight_that_is_set_stays() -> None:
    sae = sae_lens.StandardTrainingSAEConfig(**SHAPE, l1_coefficient=2.0)
    assert runner(left_open(None, sae=sae)).cfg.target_l0 is None


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "batchtopk"])
def test_a_killed_run_with_decided_settings_ends_bit_for_bit_the_same(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = type(ARCHITECTURES[architecture]())(d_in=16, d_sae=32)
    runner(left_open(tmp_path / "whole", architecture, sae=sae, n_checkpoints=5)).run()
    with monkeypatch.context() as patched:
        stop_at(patched, 13, kill)
        with pytest.raises(Killed):
            runner(left_open(tmp_path / "killed", architecture, sae=sae, n_checkpoints=5)).run()
    runner(left_open(tmp_path / "killed", architecture, sae=sae, n_checkpoints=5)).run()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_the_finished_sae_is_stock_and_fires_k_latents(tmp_path: Path) -> None:
    run = runner(left_open(tmp_path / "sae", sae=sae_lens.BatchTopKTrainingSAEConfig(16, 64, k=5)))
    run.run()
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert type(sae).__module__.startswith("sae_lens.")
    x = torch.cat([next(run.batches) for _ in range(20)])
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_every_flag_of_an_sae_has_help(architecture: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--architecture", architecture, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    made = ARCHITECTURES[architecture]()
    fields = {f.name for f in dataclasses.fields(made)}
    ours = [base for base in type(made).__mro__ if base.__module__.startswith("vision_plugin")]
    explained_below = {"target_l0"}.union(*(base.__annotations__ for base in ours))
    not_flags = {"metadata", "reshape_activations", "dtype", "device"}
    for name in fields - not_flags:
        assert f"--{name.replace('_', '-')}" in shown
        if name not in explained_below:
            assert SAE_FIELDS[name].split()[0] in shown
