"""Sweep files of wandb without its server: drawn, run here, and run by Ray Tune."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from vision_plugin.cli import main
from vision_plugin.scale import Sweep, sweep

SWEEPS = sorted((Path(__file__).parents[2] / "benchmarks" / "sweeps").glob("*.yaml"))


def test_a_grid_has_every_combination_once() -> None:
    path = next(path for path in SWEEPS if path.stem == "standard")
    found = Sweep.read(path).trials(None, 0)
    varied = {
        name: spec["values"]
        for name, spec in yaml.safe_load(path.read_text())["parameters"].items()
        if "values" in spec
    }
    expected = set(itertools.product(*varied.values()))
    assert len(found) == len(expected) == 36
    assert {tuple(trial.parameters[name] for name in varied) for trial in found} == expected
    assert len({trial.id for trial in found}) == 36


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_drawn_trials_stay_within_the_file_and_follow_from_the_seed(path: Path) -> None:
    config = Sweep.read(path)
    found = config.trials(12, 3)
    assert [trial.id for trial in found] == [trial.id for trial in config.trials(12, 3)]
    if config.method != "grid":
        assert [trial.id for trial in found] != [trial.id for trial in config.trials(12, 4)]
    for trial, (name, spec) in itertools.product(found, config.parameters.items()):
        value = trial.parameters[name]
        if "values" in spec:
            assert value in spec["values"]
        elif "value" in spec:
            assert value == spec["value"]
        else:
            assert spec["min"] <= value <= spec["max"]
            assert isinstance(value, int) == (spec.get("distribution") == "int_uniform")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2", "is no YAML"),
        ("method: grid", "is no sweep of wandb: it has no parameters"),
        ("method: hop\nparameters: {k: {value: 1}}", "method is 'hop': use grid, random, bayes"),
        ("method: grid\nparameters: {k: {value: 1}}", "names no metric"),
        ("method: grid\nmetric: {name: m}\nparameters: {k: 3}", "write k: {value: 3}"),
        ("method: grid\nmetric: {name: m}\nparameters: {k: {min: 1, max: 2}}", "k has no values"),
        (
            "method: random\nmetric: {name: m}\n"
            "parameters: {k: {min: 1, max: 2, distribution: beta}}",
            "'beta' is not drawn here",
        ),
    ],
)
def test_what_is_no_sweep_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    assert main(["sweep", str(path)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def small(tmp_path: Path) -> Path:
    """The packaged demo's sweep, with runs of seconds and two widths."""
    config = yaml.safe_load((SWEEPS[0].parent / "demo.yaml").read_text())
    assert config["parameters"]["model_name"]["value"] == "demo"
    config["method"] = "grid"
    config["parameters"] |= {
        "images": {"value": "demo:48@0"},
        "validation_images": {"value": "demo:24@1"},
        "d_sae": {"values": [48, 96]},
        "k": {"value": 4},
        "lr": {"value": 1e-3},
        "training_tokens": {"value": 4096},
        "train_batch_size_tokens": {"value": 256},
        "n_validations": {"value": 2},
        "output_path": {"value": str(tmp_path / "out" / "$WANDB_RUN_ID")},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def mean_of_squares(arguments: Sequence[str]) -> dict[str, float]:
    """A stand-in for training whose best trial is known: the test is of the order."""
    settings = dict(argument.removeprefix("--").split("=") for argument in arguments)
    return {"m": (float(settings["a"]) - 2) ** 2}


def test_the_best_trial_comes_first() -> None:
    config = Sweep("grid", "m", False, {"a": {"values": [0, 1, 2, 3]}, "b": {"value": 7}})
    found = sweep(config, mean_of_squares)
    assert [trial.parameters["a"] for trial, _ in found] == [2, 1, 3, 0]
    up = sweep(Sweep("grid", "m", True, config.parameters), mean_of_squares)
    assert up[0][0].parameters["a"] == 0
