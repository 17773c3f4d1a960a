"""One SAE over several processes: the same bits on any number, and SAELens's own numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import LoggingConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from tests.sae._runs import ARCHITECTURES
from tests.scale._workers import together
from vision_plugin.scale import LaneTeam, LatentTeam, Split
from vision_plugin.scale._select import select

ROWS, STEPS, D_IN = 64, 60, 16
FIVE = ("batchtopk", "topk", "matryoshka_batchtopk", "jumprelu", "standard")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: forked processes have the bits of this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(dtype: torch.dtype) -> Iterator[Tensor]:
    """Endless sparse mixtures of a few directions, far from norm 1."""
    make = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D_IN, generator=make, dtype=torch.float64)
    while True:
        on = torch.rand(ROWS, 40, generator=make, dtype=torch.float64)
        yield (on.pow(12) @ directions * 3 + 0.2).to(dtype)


def trainer(architecture: str, dtype: str, **more: Any) -> SAETrainer:
    """SAELens's trainer of a new SAE, or ours; some latents die and are counted as dead soon."""
    torch.manual_seed(1)
    normalize = "expected_average_only_in"
    cfg = ARCHITECTURES[architecture](dtype=dtype, normalize_activations=normalize)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    with torch.no_grad():
        sae.b_enc[::5] -= 4  # dead from the first step, so that AuxK has what to do
    settings = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=ROWS * STEPS,
        device="cpu",
        autocast=False,
        lr=3e-3,
        lr_end=3e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=5,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=10,
        n_restart_cycles=1,
        train_batch_size_samples=ROWS,
        dead_feature_window=7,
        feature_sampling_window=25,
        logger=LoggingConfig(log_to_wandb=False),
    )
    made = more.pop("team").trainer if "team" in more else SAETrainer
    return made(cfg=settings, sae=sae, data_provider=batches(getattr(torch, dtype)))


def result(found: SAETrainer) -> dict[str, Tensor]:
    """Weights and counters after the last step."""
    found.fit()
    weights = {name: tensor.clone() for name, tensor in found.sae.state_dict().items()}
    names = ("act_freq_scores", "n_forward_passes_since_fired")
    return weights | {name: getattr(found, name) for name in names}


def in_lanes(folder: Path, architecture: str, size: int, dtype: str) -> list[dict[str, Tensor]]:
    """What each of so many processes ends with."""

    def work() -> None:
        found = result(trainer(architecture, dtype, team=LaneTeam(4)))
        save_file(found, folder / f"{size}-{dist.get_rank()}")

    assert together(size, work) == [0] * size
    return [load_file(folder / f"{size}-{rank}") for rank in range(size)]


def by_latents(folder: Path, architecture: str, size: int) -> list[dict[str, Tensor]]:
    """What each of so many processes ends with, each of which holds some of the latents."""

    def work() -> None:
        found = result(trainer(architecture, "float64", team=LatentTeam()))
        save_file(found, folder / f"latents-{size}-{dist.get_rank()}")

    assert together(size, work) == [0] * size
    return [load_file(folder / f"latents-{size}-{rank}") for rank in range(size)]


def close(found: dict[str, Tensor], stock: dict[str, Tensor], within: float) -> None:
    assert found.keys() == stock.keys()
    for name, tensor in stock.items():
        error = (found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)
        assert float(error) <= within, f"{name}: {float(error):.2g}"


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def check(folder: Path, architecture: str, sizes: tuple[int, ...]) -> None:
    first, *others = [m for size in sizes for m in in_lanes(folder, architecture, size, "float32")]
    for other in others:
        assert same(first, other)
    stock = result(trainer(architecture, "float64"))
    [lanes] = in_lanes(folder, architecture, 1, "float64")
    assert int((stock["act_freq_scores"] == 0).sum()) > 0, "no latent was dead"
    close(lanes, stock, 1e-6 if architecture == "jumprelu" else 1e-12)


def test_two_workers_train_batchtopk_to_the_bits_of_one(tmp_path: Path) -> None:
    """The short form."""
    check(tmp_path, "batchtopk", (1, 2))


@pytest.mark.scale
@pytest.mark.parametrize("architecture", FIVE)
def test_one_two_three_and_four_workers_train_to_the_same_bits(
    tmp_path: Path, architecture: str
) -> None:
    """Three: two compute, and the third ends with their weights."""
    check(tmp_path, architecture, (1, 2, 3, 4))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.scale)])
@pytest.mark.parametrize(
    "architecture", ["batchtopk", pytest.param("topk", marks=pytest.mark.slow)]
)
def test_an_sae_split_by_latents_is_the_whole_one(
    tmp_path: Path, architecture: str, size: int
) -> None:
    """Against SAELens's own trainer, with dead latents that AuxK revives."""
    torch.manual_seed(1)
    stock = result(trainer(architecture, "float64"))
    assert 0 < int((stock["act_freq_scores"] == 0).sum()) < 32, "no latent was dead, or all were"
    for found in by_latents(tmp_path, architecture, size):
        close(found, stock, 1e-12)


def test_what_cannot_be_split_by_latents_is_refused() -> None:
    with pytest.raises(ValueError, match="jumprelu cannot be split by latents: use topk"):
        trainer("jumprelu", "float32", team=LatentTeam())


@given(
    values=st.lists(st.integers(0, 6), min_size=8, max_size=80),
    share=st.floats(0, 1.2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_k_largest_are_selected_ties_in_order(
    values: list[int], share: float, dtype: torch.dtype
) -> None:
    """Against sorting: values in order, of equal ones the first."""
    rows = (torch.tensor(values[: len(values) // 4 * 4], dtype=dtype) * 0.37).view(4, -1)
    k = int(share * rows.numel())
    flat = rows.flatten().tolist()
    order = sorted((place for place in range(len(flat)) if flat[place] > 0), key=lambda p: -flat[p])
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[order[:k]] = True
    found = select(LaneTeam(4), [*rows.split(1)], k)
    assert torch.equal(torch.cat(found).flatten(), expected)


def test_a_group_that_cannot_be_cut_is_refused() -> None:
    for refused in (LaneTeam, lambda n: Split(n_lanes=n)):
        with pytest.raises(ValueError, match="n_lanes=3: use a power of two"):
            refused(3)
    assert Split("latents", 3).by == "latents"  # which has no lanes
    with pytest.raises(ValueError, match=r"train_batch_size_tokens=64 .* n_lanes=128"):
        trainer("topk", "float32", team=LaneTeam(128))
    assert os.environ.get("WORLD_SIZE") is None
