"""A killed training run goes on where it was, and ends with the same bits."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests._processes import ended, in_child, kill_at_change
from tests.activations._stores import RESID, tiny_model
from tests.activations.conftest import one_thread
from tests.sae import _runs
from tests.sae._runs import ARCHITECTURES, STEPS, Killed, config, kill, runner, stop_at, weights
from vision_plugin.cli import _told
from vision_plugin.images import open_images
from vision_plugin.sae import VisionSAERunnerConfig
from vision_plugin.sae._checkpoint import CheckpointFolder

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MANY = {"n_checkpoints": 8}


def checkpoints_of(cfg: VisionSAERunnerConfig) -> CheckpointFolder:
    assert cfg.checkpoint_path is not None
    return CheckpointFolder(cfg.checkpoint_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((name, {}) for name in ARCHITECTURES),
        ("topk", {"normalize_activations": "expected_average_only_in"}),
        ("standard", {"normalize_activations": "covariance_whitening"}),
    ],
)
def test_every_architecture_goes_on_to_the_same_weights(
    architecture: str, options: dict[str, Any], tmp_path: Path, monkeypatch
) -> None:
    changes = {
        "sae": ARCHITECTURES[architecture](**options),
        "lr_scheduler_name": "cosineannealing",
        "tokens": "random:5",
        "feature_sampling_window": 6,
    }
    runner(config(tmp_path / "straight", architecture, n_checkpoints=0, **changes)).run()
    cfg = config(tmp_path / "killed", architecture, n_checkpoints=3, **changes)
    with monkeypatch.context() as patched:
        stop_at(patched, 15, kill)
        with pytest.raises(Killed):
            runner(cfg).run()
    assert checkpoints_of(cfg).steps() == [6, 12]
    torch.manual_seed(999)  # whatever the next process had drawn before
    runner(cfg).run()
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")
    assert not checkpoints_of(cfg).path.exists()


@pytest.mark.slow
def test_twenty_kills_at_random_steps(tmp_path: Path, monkeypatch) -> None:
    """Processes that kill themselves with SIGKILL, one after another, in four runs."""
    runner(config(tmp_path / "straight", n_checkpoints=0)).run()
    steps = random.Random(7)
    for run in range(4):
        cfg = config(tmp_path / f"run{run}", **MANY)
        for step in sorted(steps.sample(range(1, STEPS), 5)):

            def work(cfg: VisionSAERunnerConfig = cfg, step: int = step) -> None:
                stop_at(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
                runner(cfg).run()

            assert ended(in_child(work)) == -signal.SIGKILL
            assert checkpoints_of(cfg).last() is not None or step <= STEPS // 8
        runner(cfg).run()
        assert weights(tmp_path / f"run{run}") == weights(tmp_path / "straight")


@pytest.mark.slow
def test_killed_at_each_change_on_disk(tmp_path: Path) -> None:
    """Writing checkpoints, naming them, removing old ones, saving the SAE."""
    small = {"training_tokens": 5 * _runs.BATCH, "n_checkpoints": 3, "lr_decay_steps": 0}
    runner(config(tmp_path / "straight", **small)).run()
    survived = False
    for number in range(1, 100, 2):
        cfg = config(tmp_path / str(number), **small)

        def work(cfg: VisionSAERunnerConfig = cfg, number: int = number) -> None:
            kill_at_change(number)
            runner(cfg).run()

        survived = ended(in_child(work)) == 0
        if not Path(str(cfg.output_path)).exists():
            runner(cfg).run()
        assert weights(tmp_path / str(number)) == weights(tmp_path / "straight"), number
        if survived:
            break
    assert survived, "there are more changes than were tried"


def test_a_run_over_a_store_goes_on_too(tmp_path: Path, monkeypatch) -> None:
    store = _runs.store_of(tmp_path / "store")
    straight = config(tmp_path / "straight", images=str(tmp_path / "store"), n_checkpoints=0)
    runner(straight, images=store).run()
    cfg = config(tmp_path / "killed", images=str(tmp_path / "store"), n_checkpoints=4)
    with monkeypatch.context() as patched:
        stop_at(patched, 17, kill)
        with pytest.raises(Killed):
            runner(cfg, images=store).run()
    runner(cfg, images=store).run()
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch) -> VisionSAERunnerConfig:
    """A run that was killed with checkpoints of steps 16 and 20."""
    cfg = config(tmp_path / "sae", n_checkpoints=5)
    with monkeypatch.context() as patched:
        stop_at(patched, 21, kill)
        with pytest.raises(Killed):
            runner(cfg).run()
    assert checkpoints_of(cfg).steps() == [16, 20]
    return cfg


def test_a_kill_while_checkpoints_are_removed_leaves_nothing_in_the_way(
    interrupted: VisionSAERunnerConfig, tmp_path: Path
) -> None:
    """The marker goes last: what is left of a checkpoint is still known for one."""
    folder = checkpoints_of(interrupted)

    def work() -> None:
        unlink = os.unlink

        def killing(path: Any, **options: Any) -> None:
            if str(path).endswith("state.json"):
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(path, **options)

        os.unlink = killing  # type: ignore[assignment]
        folder.clear()

    assert ended(in_child(work)) == -signal.SIGKILL
    left = folder.path / "step-000000016"
    assert [path.name for path in left.iterdir()] == ["state.json"]
    assert folder.last() is not None  # of step 20, which was not reached
    with folder.locked():
        folder.save(16, {"x": torch.ones(2)})
    assert folder.load(16)["x"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_passed_over(
    interrupted: VisionSAERunnerConfig, tmp_path: Path, file: str, damage: str, caplog
) -> None:
    path = checkpoints_of(interrupted).path / "step-000000020" / file
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)
    else:
        path.unlink()
    found = checkpoints_of(interrupted).last()
    assert found is not None
    assert found[0] == 16
    assert "skipping checkpoint" in caplog.text


def test_another_configuration_is_not_gone_on_with(interrupted: VisionSAERunnerConfig) -> None:
    other = config(Path(str(interrupted.output_path)), n_checkpoints=5, lr=1e-4, seed=3)
    with pytest.raises(ValueError, match=r"lr: 0\.003 saved, 0\.0001 now.*seed: 42 saved, 3"):
        runner(other).run()
    assert checkpoints_of(interrupted).steps() == [16, 20]


def test_overwriting_begins_anew(interrupted: VisionSAERunnerConfig, tmp_path: Path) -> None:
    out = Path(str(interrupted.output_path))
    runner(config(out, n_checkpoints=5, seed=3, overwrite=True)).run()
    runner(config(tmp_path / "straight", seed=3)).run()
    assert weights(out) == weights(tmp_path / "straight")


def test_two_at_once_are_told_apart(interrupted: VisionSAERunnerConfig) -> None:
    with (
        checkpoints_of(interrupted).locked(),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        runner(interrupted).run()


def test_nothing_in_a_checkpoint_is_a_pickle(interrupted: VisionSAERunnerConfig) -> None:
    import pickle

    files = [path for path in checkpoints_of(interrupted).path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"state.json", "tensors.safetensors", ".lock"}
    for path in files:
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError)):
            pickle.loads(path.read_bytes())  # noqa: S301


def test_a_batch_that_is_not_finite_leaves_the_last_checkpoint(
    interrupted: VisionSAERunnerConfig, tmp_path: Path, monkeypatch
) -> None:
    run = runner(interrupted)
    plain = run.batches._next_rows

    def broken() -> dict[str, torch.Tensor]:
        monkeypatch.setattr(run.batches, "harvester", _Poisoned(run.batches.harvester))
        return plain()

    monkeypatch.setattr(run.batches, "_next_rows", broken)
    with pytest.raises(ValueError, match=r"activation vectors of .* are not finite"):
        run.run()
    assert checkpoints_of(interrupted).steps() == [16, 20]
    runner(interrupted).run()
    runner(config(tmp_path / "straight", n_checkpoints=0)).run()
    assert weights(Path(str(interrupted.output_path))) == weights(tmp_path / "straight")


class _Poisoned:
    def __init__(self, harvester: Any) -> None:
        self.harvester, self.sources = harvester, harvester.sources

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.harvester(pixels)
        return {name: activation * float("nan") for name, activation in found.items()}


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(
    interrupted: VisionSAERunnerConfig, monkeypatch
) -> None:
    run = runner(interrupted)
    monkeypatch.setattr(
        run.sae, "mse_loss_fn", lambda a, b: (a - b).square() * torch.tensor(float("nan"))
    )
    with pytest.raises(ValueError, match=r"not finite after step 24.*Lower lr") as failed:
        run.run()
    assert _told(failed.value)[0] == 1  # the command's run failed; it was not refused
    assert checkpoints_of(interrupted).steps() == [16, 20]
    assert not Path(str(interrupted.output_path)).exists()


def test_too_few_vectors_for_a_batch_and_none_at_all(tmp_path: Path) -> None:
    few = open_images(_runs.images(1))
    with pytest.raises(ValueError, match=r"1 images give 17 vectors.*less than one batch of 32"):
        runner(config(tmp_path / "sae"), images=few).run()
    store = _runs.store_of(tmp_path / "store", tokens="cls")
    with pytest.raises(ValueError, match=r"holds 12 vectors.*less than one batch of 32"):
        runner(config(tmp_path / "sae", tokens="cls"), images=store)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk; the system refuses the write."""
    cfg, told = config(tmp_path / "sae", n_checkpoints=5), tmp_path / "told.txt"

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save, seen = CheckpointFolder.save, []

        def limited(self: CheckpointFolder, step: int, state: dict[str, Any]) -> None:
            if seen:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            seen.append(step)
            save(self, step, state)

        CheckpointFolder.save = limited  # type: ignore[method-assign]
        try:
            runner(cfg).run()
        except OSError as error:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            told.write_text(f"{type(error).__name__}: {error}")

    assert ended(in_child(work)) == 0
    assert "CheckpointFullError" in told.read_text()
    assert "no room to write the checkpoint of step 8" in told.read_text()
    assert "The checkpoint of step 4 is safe" in told.read_text()
    assert checkpoints_of(cfg).steps() == [4]
    runner(cfg).run()
    runner(config(tmp_path / "straight", n_checkpoints=0)).run()
    assert weights(tmp_path / "sae") == weights(tmp_path / "straight")


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 128 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if made.returncode:
        pytest.skip("this process may not mount a file system")
    cfg = config(disk / "sae", n_checkpoints=5)
    try:
        with pytest.raises(OSError, match="no room to write the checkpoint") as caught:
            runner(cfg).run()
        assert caught.value.errno == errno.ENOSPC
        assert checkpoints_of(cfg).last() is not None
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        runner(cfg).run()
        runner(config(tmp_path / "straight", n_checkpoints=0)).run()
        assert weights(disk / "sae") == weights(tmp_path / "straight")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_checkpoints_keep_strides_and_nested_values(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "c")
    transposed = torch.arange(6.0).reshape(2, 3).T
    state = {"a": [1, {"b": transposed, "c": None}], "d": (2.5, "x"), "e": torch.empty(0, 4)}
    with folder.locked():
        folder.save(3, state)
    step, found = folder.last() or (0, {})
    assert step == 3
    assert torch.equal(found["a"][1]["b"], transposed)
    assert found["d"] == [2.5, "x"]
    assert found["e"].shape == (0, 4)


def test_tiny_model_is_one_model() -> None:
    """The runs above compare bits: they have to share their model."""
    assert tiny_model() is tiny_model()
    assert RESID in tiny_model().hook_dict
