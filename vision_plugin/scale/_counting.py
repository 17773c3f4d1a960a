"""What trainers of several processes have in common: counters of the whole batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vision_plugin.sae import Progress, SteppedTrainer
from vision_plugin.scale._team import Lanes


class CountingTrainer(SteppedTrainer):
    """SAELens's trainer, whose counters are told what fired in the whole batch.

    Args:
        team: The processes.
        **settings: Arguments of ``SteppedTrainer``.
    """

    def __init__(self, *, team: Lanes, **settings: Any) -> None:
        super().__init__(**settings)
        self.team = team
        self._l0 = 0.0

    def mean_l0(self, output: Any) -> float:
        """Return the mean number of active latents per vector of the whole batch."""
        del output
        return self._l0

    @torch.no_grad()
    def note(self, fired: Tensor) -> None:
        """Update the counters of the latents as SAELens does after a whole batch.

        Args:
            fired: How many vectors of the batch each latent fired on.
        """
        n_rows = self.cfg.train_batch_size_samples
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired.to(self.act_freq_scores.dtype)
        self.n_frac_active_samples += n_rows
        self._l0 = float(fired.sum()) / n_rows

    def progress(self, output: Any) -> Progress:
        """Return figures of the SAE in training; the explained variance is of this part."""
        return dataclasses.replace(super().progress(output), l0=self._l0)

    def _schedule(self) -> None:
        """Move every schedule by one step, as SAELens does at the end of its own step."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()

    def _update_pbar(self, step_output: Any, pbar: Any, update_interval: int = 0) -> None:
        if self.team.leads:
            super()._update_pbar(step_output, pbar, update_interval)
