"""Scales and initial weights that a run takes from the data before its first step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from vision_plugin.sae._archetypal import archetypes
from vision_plugin.sae._config import VisionSAERunnerConfig, number
from vision_plugin.sae._sources import Batches
from vision_plugin.sae._trainer import SteppedTrainer

logger = logging.getLogger(__name__)

_SCALE, _WHITEN = "expected_average_only_in", "covariance_whitening"
_DECODER_NORM = 0.1
_ROWS_OF_CUT = 4096


def estimate_scalers(
    trainers: Mapping[str, SAETrainer], batches: Batches, *, n_batches: int
) -> None:
    """Estimate the scale of the activations for SAEs that scale them, with SAELens's estimators.

    Training sees the same batches again, so that SAEs with and without a scale train on the same
    batches.

    Args:
        trainers: Trainers by the SAE's name.
        batches: Batches by the SAE's name, or one tensor for a single SAE.
        n_batches: Number of batches to estimate from.
    """
    wanted = {
        name: kind
        for name, trainer in trainers.items()
        if (kind := trainer.sae.cfg.normalize_activations) in (_SCALE, _WHITEN)
    }
    if not wanted:
        return
    place = batches.state_dict()
    kept: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for _ in range(n_batches):
        batch = next(batches)
        for name, kind in wanted.items():
            rows = batch[name] if isinstance(batch, dict) else batch
            # For rows that hold one value each, SAELens takes that value as their norm.
            kept[name].append(rows.norm(dim=-1, keepdim=True) if kind == _SCALE else rows)
    batches.load_state_dict(place)
    for name, kind in wanted.items():
        scaler, cfg = trainers[name].activation_scaler, trainers[name].sae.cfg
        estimate = scaler.estimate_scaling_factor if kind == _SCALE else scaler.estimate_whitening
        estimate(
            d_in=cfg.d_in, data_provider=iter(kept[name]), n_batches_for_norm_estimate=n_batches
        )


@torch.no_grad()
def initialise(trainer: SteppedTrainer, rows: Tensor, cfg: VisionSAERunnerConfig) -> None:
    """Set an SAE's decoder bias, decoder directions and thresholds before its first step.

    Args:
        trainer: Trainer of the SAE. Its scale must be estimated, because the weights belong to
            scaled activations.
        rows: Activations as the model gives them, [n, d_in]; for a transcoder [n, d_in + d_out].
        cfg: Configuration of the run.

    Raises:
        ValueError: the activations and the SAE differ in width.
    """
    sae = trainer.sae
    at_target = getattr(sae.cfg, "jumprelu_init_threshold", 0.0) < 0
    width = sae.cfg.d_in + getattr(sae.cfg, "d_out", 0)
    if rows.shape[1] != width:
        raise ValueError(
            f"the SAE takes {width} dimensions, but {' and '.join(cfg.hook_names)} of "
            f"{cfg.model_name} give {rows.shape[1]}"
        )
    is_plain = cfg.b_dec_init_method == "zeros" and cfg.decoder_init_method == "random"
    if is_plain and not at_target and trainer.archetypal is None:
        return
    rows = trainer.activation_scaler(rows.to(sae.device))[:, -sae.W_dec.shape[1] :]
    centre = geometric_median(rows) if cfg.b_dec_init_method == "geometric_median" else rows.mean(0)
    if cfg.b_dec_init_method != "zeros":
        sae.b_dec.copy_(centre)
    if cfg.decoder_init_method == "data":
        _decoder_from(rows - centre, sae, cfg)
    if trainer.archetypal is not None:
        points = archetypes(rows - sae.b_dec, cfg.archetypal_points, seed=cfg.seed)
        trainer.archetypal.place(points, norm=sae.cfg.decoder_init_norm or _DECODER_NORM)
        if not hasattr(sae.cfg, "d_out"):
            sae.W_enc.copy_(sae.W_dec.T)
    if at_target:
        sae.threshold.fill_(_cut(rows[:_ROWS_OF_CUT], sae, number(cfg, "target_l0")))


def _cut(rows: Tensor, sae: Any, n_active: float) -> float:
    """Return the threshold at which ``n_active`` latents fire on a row on average."""
    before = sae.process_sae_in(rows) @ sae.W_enc + sae.b_enc
    wanted = min(max(1, round(n_active * len(rows))), before.numel())
    return max(0.0, float(before.flatten().topk(wanted).values[-1]))


def _decoder_from(rows: Tensor, sae: Any, cfg: VisionSAERunnerConfig) -> None:
    """Take random rows as decoder directions; an SAE's encoder becomes their transpose."""
    rows = rows[rows.norm(dim=-1) > 0]
    generator = torch.Generator().manual_seed(cfg.seed)
    chosen = torch.randperm(len(rows), generator=generator)[: sae.cfg.d_sae]
    if len(chosen) < sae.cfg.d_sae:
        logger.warning(
            "the buffer holds %d activations for %d latents: the other decoder directions stay "
            "random. Raise n_batches_in_buffer to have more activations",
            *(len(chosen), sae.cfg.d_sae),
        )
    norm = sae.cfg.decoder_init_norm or _DECODER_NORM
    directions = torch.nn.functional.normalize(rows[chosen.to(rows.device)], dim=-1) * norm
    sae.W_dec[: len(chosen)] = directions.to(sae.W_dec.dtype)
    if not hasattr(sae.cfg, "d_out"):
        sae.W_enc[:, : len(chosen)] = sae.W_dec[: len(chosen)].T


def geometric_median(
    rows: Float[Tensor, "n d_in"], *, tolerance: float = 1e-6, max_iterations: int = 200
) -> Float[Tensor, " d_in"]:
    """Return the point with the least sum of distances to the rows, by Weiszfeld's iteration.

    Vision transformers have a few activations of enormous norm, which move this point far less
    than they move the mean. The computation is in float64.

    Args:
        rows: Activations; at least one.
        tolerance: Length of a step, relative to the mean distance, at which the iteration stops.
        max_iterations: Largest number of steps.

    Source: E. Weiszfeld, "Sur le point pour lequel la somme des distances de n points donnés est
    minimum" (1937).
    """
    points = rows.double()
    median = points.mean(0)
    for _ in range(max_iterations):
        distances = (points - median).norm(dim=1)
        weights = 1 / distances.clamp(min=1e-12)
        following = (weights @ points) / weights.sum()
        step = (following - median).norm()
        median = following
        if step <= tolerance * distances.mean():
            break
    return median.to(rows.dtype)


def by_name(batch: Any, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each SAE with its batch; a batch that is one tensor serves all of them."""
    for name in names:
        yield name, batch[name] if isinstance(batch, dict) else batch
