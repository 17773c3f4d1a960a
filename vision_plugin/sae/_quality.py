"""Measure a finished SAE on vectors of the training stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin import metrics
from vision_plugin.models import encode_tokens
from vision_plugin.sae._config import VisionSAERunnerConfig

DENSE_ABOVE = 0.1
"""Share of the vectors above which a latent that fires on them is dense."""
MANY_DEAD = 0.1
"""Share of dead latents from which on :meth:`Quality.advice` says what to change."""
_CHUNK = 2048


@dataclass(frozen=True)
class Quality:
    """Numbers of latents and reconstruction quality of an SAE on some vectors.

    Examples:
        >>> import dataclasses
        >>> short = dataclasses.replace(cfg, training_tokens=256, output_path=None)
        >>> runner = vp.VisionSAETrainingRunner(short, model=model)
        >>> _ = runner.run()
        >>> runner.quality.n_latents, 0 < runner.quality.l0 <= 8
        (256, True)
    """

    n_vectors: int
    """Number of vectors measured."""
    n_latents: int
    """Number of latents of the SAE."""
    n_alive: int
    """Number of latents that fire on at least one vector."""
    n_dead: int
    """Number of latents that fire on no vector."""
    n_dense: int
    """Number of latents that fire on more than a tenth of the vectors."""
    l0: float
    """Mean number of latents that fire on a vector."""
    explained_variance: float
    """``1 - sum |x - xhat|^2 / sum |x - mean(x)|^2``."""

    def scores(self, prefix: str = "quality/") -> dict[str, float]:
        """Return the figures by name, for wandb."""
        return {f"{prefix}{name}": float(value) for name, value in dataclasses.asdict(self).items()}

    def sentence(self) -> str:
        """Return the figures as one line."""
        return (
            f"{self.n_alive:,} of {self.n_latents:,} latents alive ({self.n_dead:,} dead, "
            f"{self.n_dense:,} dense), {self.l0:.1f} active per vector, explained variance "
            f"{self.explained_variance:.3f}; measured on {self.n_vectors:,} vectors"
        )

    def advice(self, cfg: VisionSAERunnerConfig) -> str:
        """Return what to change if a tenth of the latents or more are dead, otherwise ``""``."""
        share = self.n_dead / self.n_latents
        if share < MANY_DEAD:
            return ""
        if cfg.defaults == "saelens":
            change = "set defaults to auto, whose initial weights keep most latents alive"
        elif "lr" not in _decided(cfg) or "dead_feature_window" not in _decided(cfg):
            change = "leave lr and dead_feature_window unset, or lower lr"
        else:
            change = (
                f"train on more than {cfg.training_tokens:,} vectors (training_tokens), or make "
                f"the SAE narrower than {self.n_latents:,} (d_sae)"
            )
        return f"{share:.0%} of the latents are dead: {change}."


def _decided(cfg: VisionSAERunnerConfig) -> dict[str, Any]:
    decided: dict[str, Any] = cfg.sae.metadata.to_dict().get("auto") or {}
    return decided


@torch.no_grad()
def measure(sae: Any, batches: Iterable[Float[Tensor, "batch width"]]) -> Quality:
    """Measure an inference SAE.

    Args:
        sae: SAE that takes activations as the model gives them.
        batches: Such activations; for a transcoder its input and target side by side.
    """
    d_in = int(sae.cfg.d_in)
    d_out = int(getattr(sae.cfg, "d_out", d_in))
    sparsity = metrics.Sparsity(n_features=int(sae.cfg.d_sae), dense_above=DENSE_ABOVE)
    fidelity = metrics.FVU(d_in=d_out, definition="per_dimension")
    for batch in batches:
        rows = batch.to(sae.W_dec.device, sae.W_dec.dtype)
        latents = encode_tokens(sae, rows[:, None, :d_in])
        sparsity.update(latents.flat())
        fidelity.update(rows[:, -d_out:], latents.reconstruction[:, 0])
    fires, fit = sparsity.compute(), fidelity.compute()
    return Quality(
        n_vectors=fit.n_tokens,
        n_latents=int(sae.cfg.d_sae),
        n_alive=int(sae.cfg.d_sae) - fires.n_dead,
        n_dead=fires.n_dead,
        n_dense=fires.n_dense,
        l0=fires.l0,
        explained_variance=fit.explained_variance,
    )


def record(sae: Any, quality: Quality) -> None:
    """Write the figures into a training SAE's metadata, in place of SAELens's counts."""
    metadata = sae.cfg.metadata
    metadata["quality"] = dataclasses.asdict(quality)
    metadata["l0"] = quality.l0
    metadata["num_dead_features"] = quality.n_dead


@torch.no_grad()
def fit_threshold(sae: Any, rows: Float[Tensor, "n d_in"]) -> None:
    """Set the threshold of a BatchTopK SAE so that k latents fire on average.

    In training, the k * batch largest latents of a batch fire. The finished SAE has one threshold
    instead. SAELens takes it from a moving average that begins at zero, so it lags behind a
    threshold that moves, and is too low after a short run.

    Args:
        sae: Training SAE after its last step; it takes activations as the model gives them.
        rows: Activations to fit the threshold on.
    """
    wanted = round(sae.cfg.k * len(rows))
    norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else 1.0
    largest = rows.new_zeros(0)
    for chunk in rows.split(_CHUNK):
        latents = ((sae.process_sae_in(chunk) @ sae.W_enc + sae.b_enc) * norms).relu().flatten()
        latents = latents.topk(min(wanted + 1, latents.numel())).values
        largest = torch.cat([largest, latents])
        largest = largest.topk(min(wanted + 1, largest.numel())).values
    positive = largest[largest > 0]
    if len(positive) > wanted:
        sae.topk_threshold.copy_((positive[wanted - 1] + positive[wanted]).double() / 2)
    elif len(positive):
        sae.topk_threshold.copy_(positive[-1].double() / 2)


def take(batches: Iterable[Any], n: int) -> Iterator[Any]:
    """Yield batches until they hold at least ``n`` vectors together."""
    taken = 0
    for batch in batches:
        yield batch
        rows = next(iter(batch.values())) if isinstance(batch, dict) else batch
        taken += len(rows)
        if taken >= n:
            return
