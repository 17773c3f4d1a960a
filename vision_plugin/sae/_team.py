"""What several processes that train one SAE together have to say to a training session."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from vision_plugin.sae._trainer import SteppedTrainer


@runtime_checkable
class Team(Protocol):
    """Processes that train one SAE together, as one of them sees it.

    Examples:
        >>> team = vp.scale.LaneTeam(n_lanes=8)
        >>> isinstance(team, vp.sae.Team), team.leads
        (True, True)
    """

    @property
    def leads(self) -> bool:
        """Whether this is the first of them: it alone writes, validates and logs."""

    def identity(self) -> dict[str, Any]:
        """Return JSON values that decide the bits of the result, to go into a checkpoint."""

    def agree(self, step: int | None) -> int | None:
        """Return the step of the checkpoint that the first of them found, to all of them."""

    def trainer(self, **settings: Any) -> SteppedTrainer:
        """Return a trainer that shares its steps with the others."""
