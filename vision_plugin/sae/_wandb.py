"""Weights & Biases: a run during a ``with`` block, if the user asks for one."""

from __future__ import annotations

import os
from typing import Any

from sae_lens import LoggingConfig


class WandbRun:
    """A run of wandb; without ``log_to_wandb`` every method does nothing.

    wandb itself reads ``WANDB_MODE``: ``offline`` writes below ``WANDB_DIR``.
    """

    def __init__(self, cfg: LoggingConfig, settings: dict[str, Any], run_id: str | None) -> None:
        """Set what the run is called and what it belongs to.

        Args:
            cfg: Project, name, and whether to log at all.
            settings: Configuration to show in the run.
            run_id: Id of a run to continue; None begins a new one.
        """
        self.cfg, self.settings = cfg, settings
        self.id = cfg.wandb_id or run_id

    def __enter__(self) -> WandbRun:
        if self.cfg.log_to_wandb:
            import wandb

            run = wandb.init(
                project=self.cfg.wandb_project,
                entity=self.cfg.wandb_entity,
                config=self.settings,
                name=self.cfg.run_name,
                id=self.id,
                dir=os.environ.get("WANDB_DIR"),  # wandb itself reads it only once per process
                resume=None if self.id is None else "allow",
            )
            self.id = run.id
        return self

    def __exit__(self, *error: object) -> None:
        if self.cfg.log_to_wandb:
            import wandb

            wandb.finish(exit_code=0 if error[0] is None else 1)

    def log(self, values: dict[str, Any], *, step: int | None) -> None:
        """Log values of a step; None stands for the last step logged."""
        if self.cfg.log_to_wandb:
            import wandb

            wandb.log(values, step=step)
