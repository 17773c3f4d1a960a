"""Train one SAE over several processes: under torchrun, under Ray Train, or in this one alone."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from sae_lens import SAE
from torch import distributed as dist

from vision_plugin.sae import VisionSAERunnerConfig, VisionSAETrainingRunner, architecture_of
from vision_plugin.scale._lanes import LaneTeam
from vision_plugin.scale._latents import LatentTeam
from vision_plugin.scale._team import Lanes, check_lanes

N_LANES = 8
"""Lanes of a batch: as many processes at most, and part of what decides the last bits.

Examples:
    >>> vp.scale.N_LANES
    8
"""


def train_in_lanes(
    cfg: VisionSAERunnerConfig, *, n_lanes: int = N_LANES, **in_hand: Any
) -> SAE[Any]:
    """Train one SAE together with the other processes that call this, and return it in each.

    Under ``torchrun``, each process calls it with the same configuration; a single process may
    call it too. One, two, four or more processes give the same weights, bit for bit, on machines
    of one kind, and a checkpoint of some number of processes continues on another number. The
    first process writes. The disk of ``cfg.output_path`` has to be shared.

    Each process reads the same stream of batches and computes its part of each, so a store of
    activations serves better than images that every process sends through the model.

    Args:
        cfg: Configuration of the run. BatchTopK and Matryoshka train with SAELens's dense step.
        n_lanes: Parts that each batch is cut into, a power of two; as many processes at most
            compute.
        **in_hand: Other arguments of ``VisionSAETrainingRunner``, for example ``model=``.

    Raises:
        ValueError: the batch cannot be cut into the lanes, or the configuration does not fit.

    Examples:
        >>> import dataclasses
        >>> short = dataclasses.replace(cfg, training_tokens=512, output_path=None)
        >>> vp.scale.train_in_lanes(short, model=model).cfg.d_sae
        256
    """
    with shared_runner(cfg, Split("lanes", n_lanes), **in_hand) as runner:
        return runner.run()


def train_by_latents(cfg: VisionSAERunnerConfig, **in_hand: Any) -> SAE[Any]:
    """Train one SAE whose latents are split over the processes that call this; return it in each.

    For dictionaries that do not fit one device: each process holds a slice of the encoder and of
    the decoder on its device, and their optimiser states. The whole lies in the host's memory. The
    weights are those of one process up to rounding. Otherwise this is :func:`train_in_lanes`, and
    a checkpoint of some number of processes continues on another number too.

    Args:
        cfg: Configuration of the run, of a TopK or BatchTopK SAE, which trains with SAELens's
            dense step.
        **in_hand: Other arguments of ``VisionSAETrainingRunner``, for example ``model=``.

    Raises:
        ValueError: the SAE is of another kind, or its latents cannot be cut into equal slices.

    Examples:
        >>> import dataclasses
        >>> short = dataclasses.replace(cfg, training_tokens=512, output_path=None)
        >>> vp.scale.train_by_latents(short, model=model).cfg.d_sae
        256
    """
    with shared_runner(cfg, Split("latents"), **in_hand) as runner:
        return runner.run()


@dataclasses.dataclass(frozen=True)
class Split:
    """How the processes that train one SAE divide the work.

    Raises:
        ValueError: ``by`` is another word, or the number of lanes is no power of two.

    Examples:
        >>> vp.scale.Split(by="latents").n_lanes
        8
    """

    by: str = "lanes"
    """``lanes``: each computes a part of the batch; ``latents``: each holds a part of the SAE."""
    n_lanes: int = N_LANES
    """Parts of the batch for ``lanes``, a power of two; it decides the last bits."""

    def __post_init__(self) -> None:
        if self.by not in ("lanes", "latents"):
            raise ValueError(f"share={self.by!r}: use 'lanes' or 'latents'")
        if self.by == "lanes":
            check_lanes(self.n_lanes)


@contextlib.contextmanager
def shared_runner(
    cfg: VisionSAERunnerConfig, split: Split, **in_hand: Any
) -> Iterator[VisionSAETrainingRunner]:
    """Yield a runner that trains with the other processes, which it joins for a ``with`` block.

    Args:
        cfg: Configuration of the run.
        split: How the processes divide the work.
        **in_hand: Other arguments of ``VisionSAETrainingRunner``.

    Raises:
        ValueError: the configuration does not fit.

    Examples:
        >>> import dataclasses
        >>> short = dataclasses.replace(cfg, training_tokens=512, output_path=None)
        >>> with vp.scale.shared_runner(short, vp.scale.Split(), model=model) as runner:
        ...     runner.cfg.total_training_steps
        2
    """
    with _group():
        team: Lanes
        if split.by == "lanes":
            team = LaneTeam(split.n_lanes)
            cfg = _of_team(cfg, team)
        else:
            team = LatentTeam(cfg.device)
            cfg = dataclasses.replace(_of_team(cfg, team), device="cpu", dense=True)
        yield VisionSAETrainingRunner(cfg, team=team, **in_hand)


def _of_team(cfg: VisionSAERunnerConfig, team: Lanes) -> VisionSAERunnerConfig:
    """Return the configuration as a process of a team needs it.

    Raises:
        ValueError: a setting looks at all pairs of a batch.
    """
    if cfg.mono_coefficient:
        raise ValueError(
            f"mono_coefficient={cfg.mono_coefficient} compares all vectors of a batch, which no "
            "process has whole: train without it, or in one process"
        )
    logger = cfg.logger
    if not team.leads:
        logger = dataclasses.replace(logger, log_to_wandb=False)
    dense = cfg.dense or "batchtopk" in architecture_of(cfg.sae)
    return dataclasses.replace(cfg, dense=dense, logger=logger)


@contextlib.contextmanager
def _group() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, unless they are together already."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > 1
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
