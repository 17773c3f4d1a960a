"""The sweep files: wandb's schema, its controller's proposals, the command, and the metric."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from vision_plugin.cli import main
from vision_plugin.cli._train import as_flags, read_config

SWEEPS = sorted((Path(__file__).parents[2] / "benchmarks" / "sweeps").glob("*.yaml"))
SMALL = {
    "d_sae": 48,
    "k": 4,
    "matryoshka_widths": [8, 48],
    "training_tokens": 10 * 64,
}
"""Replaces what the tiny model and the tiny images cannot have."""

PINS = ("sweeps", "numpy<2", "setuptools<81", "pyyaml")
"""What the controller needs; it imports pkg_resources, which newer setuptools have not."""

CONTROLLER = """
import json, sys
import sweeps, yaml
for path in sys.argv[1:]:
    config = yaml.safe_load(open(path))
    violations = sweeps.schema_violations_from_proposed_config(config)
    runs, proposed = [], []
    for i in range(2):
        run = sweeps.next_run(config, runs)
        if run is None:
            break
        proposed.append(run.config)
        run.state = sweeps.RunState.finished
        run.summary_metrics = {config["metric"]["name"]: 0.1 * i}
        runs.append(run)
    print(json.dumps({"path": path, "violations": violations, "proposed": proposed}))
"""


def proposal(config: dict[str, Any]) -> dict[str, Any]:
    """The first value of every parameter, as wandb's server hands it to the agent."""
    return {name: {"value": _first(spec)} for name, spec in config["parameters"].items()}


def _first(spec: dict[str, Any]) -> Any:
    for key in ("value", "min"):
        if key in spec:
            return spec[key]
    return spec["values"][0]


def expanded(config: dict[str, Any], args: dict[str, Any]) -> list[str]:
    """The command line, as wandb's agent makes it of a run's arguments."""
    variables = {
        **create_sweep_command_args({"args": args}),
        "env": ["/usr/bin/env"],
        "program": [config["program"]],
        "interpreter": ["python"],
    }
    line: list[str] = []
    for part in create_sweep_command(config["command"]):
        is_variable = part.startswith("${") and part.endswith("}")
        line += variables[part[2:-1]] if is_variable else [part]
    return line


def flags_of(config: dict[str, Any], args: dict[str, Any]) -> list[str]:
    line = expanded(config, args)
    assert line[:3] == ["/usr/bin/env", "vision-plugin", "train"]
    return line[3:]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_expanded_command_becomes_the_configuration(path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    config = yaml.safe_load(path.read_text())
    args = proposal(config)
    cfg = read_config(flags_of(config, args))
    fields = {**cfg.to_dict(), **cfg.sae.to_dict(), **cfg.to_dict()["logger"]}
    for name, spec in args.items():
        if name not in ("preset", "output_path"):
            assert fields[name] == spec["value"], name
    assert cfg.output_path == f"runs/sweeps/{path.stem}/abc123"
    assert cfg.logger.log_to_wandb is True
    assert cfg.logger.log_weights_to_wandb is False
    assert cfg.validation_images is not None


def test_what_an_agent_writes_is_read() -> None:
    class Flags:
        dense: bool
        widths: list[int]
        names: tuple[str, ...]
        lr: float

    arguments = ["--dense=True", "--widths=[8, 16]", "--names=('a', 'b')", "--lr=0.1"]
    expected = ["--dense", "--widths", "8", "16", "--names", "a", "b", "--lr=0.1"]
    assert as_flags(arguments, Flags) == expected
    assert as_flags(["--dense=False"], Flags) == ["--no-dense"]
    assert as_flags(["--dense"], Flags) == ["--dense"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("a red circle", "a blue square"):
        (root / label).mkdir()
        for i in range(6):
            values = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(values).save(root / label / f"{i}.png")
    return str(root)


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_metric_that_is_optimised_is_in_the_offline_run(
    path: Path, tiny_clip: str, images: str, tmp_path: Path, monkeypatch
) -> None:
    run_as_proposed(path, None, tiny_clip, images, tmp_path, monkeypatch)


def run_as_proposed(
    path: Path,
    args: dict[str, Any] | None,
    tiny_clip: str,
    images: str,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Run a proposal at a size that takes a second, and look for the metric."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = yaml.safe_load(path.read_text())
    args = args or proposal(config)
    small = {name: {"value": value} for name, value in SMALL.items() if name in args}
    places = {
        "model_name": {"value": tiny_clip},
        "hook_name": {"value": "blocks.1.hook_resid_post"},
        "tokens": {"value": "all"},
        "images": {"value": images},
        "validation_images": {"value": images},
        "output_path": {"value": str(tmp_path / "sae")},
        "d_in": {"value": 0},
        "train_batch_size_tokens": {"value": 64},
        "n_batches_in_buffer": {"value": 2},
        "n_batches_for_norm_estimate": {"value": 2},
        "lr_warm_up_steps": {"value": 0},
        "lr_decay_steps": {"value": 0},
        "n_validations": {"value": 2},
        "validation_template": {"value": "{}"},
    }
    assert main(["train", *flags_of(config, {**args, **small, **places})]) == 0
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert config["metric"]["name"].encode() in run.read_bytes()
    lines = (tmp_path / "sae" / "validation.jsonl").read_text().splitlines()
    assert config["metric"]["name"] in json.loads(lines[-1])


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What wandb's own controller says of the files: it needs numpy 1, so an environment apart."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    environment = tmp_path_factory.mktemp("controller") / "env"
    python = environment / "bin" / "python"
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(environment)],
        [uv, "pip", "install", "--quiet", "--python", str(python), *PINS],
    ):
        try:
            made = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"an environment for wandb's controller cannot be made: {error}")
        if made.returncode:
            pytest.skip(f"wandb's controller cannot be installed: {made.stderr.strip()[-300:]}")
    script = environment / "controller.py"
    script.write_text(CONTROLLER)
    done = subprocess.run(
        [str(python), str(script), *map(str, SWEEPS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_wandb_s_controller_takes_the_files_and_its_proposals_run(
    controller: list[dict[str, Any]],
    tiny_clip: str,
    images: str,
    tmp_path: Path,
    monkeypatch,
) -> None:
    assert [Path(found["path"]) for found in controller] == SWEEPS
    for found in controller:
        assert found["violations"] == []
        assert len(found["proposed"]) == 2
        config = yaml.safe_load(Path(found["path"]).read_text())
        for args in found["proposed"]:
            assert set(args) == set(config["parameters"])
        read_config(flags_of(config, found["proposed"][-1]))
    last = controller[0]["proposed"][-1]
    run_as_proposed(SWEEPS[0], last, tiny_clip, images, tmp_path, monkeypatch)
