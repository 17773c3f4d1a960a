"""Evaluation, many SAEs and a sweep on one Ray cluster: the results of one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sae import _runs
from tests.scale.test_evaluation import compare, sae
from tests.scale.test_sweep import small
from tests.scale.test_training import many
from vision_plugin.cli._sweep import train_trial
from vision_plugin.sae import streams, train_many
from vision_plugin.scale import RayEngine, Sweep, sweep

__all__ = ["sae"]

pytestmark = pytest.mark.scale


def test_a_process_may_start_one_cluster_after_another() -> None:
    """Each has a token of its own."""
    for number in range(2):
        with RayEngine(num_cpus=1, object_store_memory=100_000_000) as engine:
            assert engine.ray.get(engine.ray.put(number)) == number


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayEngine]:
    """A cluster of this machine, where wandb writes to a folder."""
    logs = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(logs))
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        with RayEngine(num_cpus=2, object_store_memory=100_000_000) as found:
            yield found


def test_workers_have_the_numbers_of_one_process(
    engine: RayEngine, sae: str, tmp_path: Path
) -> None:
    compare(sae, tmp_path, engine)


def test_many_saes_on_a_cluster_have_the_weights_of_one_process(
    engine: RayEngine, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    _runs.store_of(store)
    cfgs = many(store)
    saes = train_many(cfgs, output_path=str(tmp_path / "out"), engine=engine)
    assert list(saes) == ["batchtopk", "topk", "seeded"]
    for number, group in enumerate(streams(cfgs), 1):
        train_many(group, output_path=str(tmp_path / f"local-{number}"))
        for name in group:
            there = tmp_path / "out" / f"group-{number}" / name
            assert _runs.weights(there) == _runs.weights(tmp_path / f"local-{number}" / name)


def test_ray_tune_runs_the_trials_of_one_process_each_logged_for_wandb(
    engine: RayEngine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = Sweep.read(small(tmp_path))
    found = sweep(config, train_trial, engine=engine)
    ids = {trial.id for trial, _ in found}
    assert len(ids) == 2
    best, last = (figures[config.metric] for _, figures in found)
    assert best >= last
    logs = tmp_path_factory.getbasetemp().glob("logs*/wandb/offline-*")
    assert {path.name.rsplit("-", 1)[-1] for path in logs} == ids
    files = {path.name: path for path in (tmp_path / "out").iterdir() if path.name in ids}
    assert files.keys() == ids
    before = {name: _runs.weights(path) for name, path in files.items()}
    logged = [(path / "validation.jsonl").read_text() for path in files.values()]
    assert {json.loads(log.splitlines()[-1])[config.metric] for log in logged} == {best, last}
    (tmp_path / "out").rename(tmp_path / "there")
    here: list[Any] = sweep(config, train_trial)
    assert {name: _runs.weights(tmp_path / "out" / name) for name in before} == before
    assert [trial.id for trial, _ in here] == [trial.id for trial, _ in found]
