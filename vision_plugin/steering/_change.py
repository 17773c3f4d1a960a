"""One change of an activation: which coefficients, by how much, on which tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vision_plugin.models import TokenSelection
from vision_plugin.steering._basis import Basis, Latents, check_targets
from vision_plugin.steering._where import Where

Operation: TypeAlias = Literal["clamp", "add", "scale", "suppress", "project", "swap"]

_NOUNS = {"latents": "latent", "neurons": "neuron", "directions": "direction"}
_SHOWN = 6
"""Most targets that a text names."""


@dataclass(frozen=True, eq=False)
class Change:
    """One change at one hook; an :class:`Edit` is one or several.

    Attributes:
        operation: ``"clamp"`` and ``"suppress"`` set coefficients to the amounts, ``"add"`` adds
            them, ``"scale"`` multiplies by them, ``"project"`` takes directions out, ``"swap"``
            takes the coefficients of other images.
        basis: What is counted: latents, neurons or directions.
        targets: Numbers of the latents, neurons or directions.
        amounts: One number per target, in the basis's own units.
        maxima: Largest value of each target, where the amounts were given as multiples of it.
        tokens: Kind of token that changes.
        patches: Numbers of the patches that change, row by row; None for all tokens of the kind.
        above: Change a coefficient only where it is above this value; None changes it everywhere.
        where: On which of those tokens, by what latents of the same dictionary do; None takes all.
        include_error: Whether what the dictionary does not reconstruct stays.
        keep_norm: Whether each token keeps its norm.

    Examples:
        >>> (change,) = vp.Edit.clamp(sae, {12: 50.0}).changes
        >>> change.operation, change.targets, change.amounts
        ('clamp', (12,), (50.0,))
    """

    operation: Operation
    basis: Basis
    targets: tuple[int, ...]
    amounts: tuple[float, ...]
    maxima: tuple[float, ...] | None
    tokens: str
    patches: tuple[int, ...] | None
    above: float | None
    include_error: bool
    keep_norm: bool
    where: Where | None = None

    def __post_init__(self) -> None:
        noun = _NOUNS[self.basis.kind]
        if not self.targets:
            raise ValueError(f"an edit needs at least one {noun}: name one")
        check_targets(self.targets, self.basis.size, noun, self.basis.hook_name)
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"a {noun} is named twice: give each one once")
        for name, values in (("amounts", self.amounts), ("maxima", self.maxima)):
            if values is not None and len(values) != len(self.targets):
                raise ValueError(f"{len(values)} {name} stand for {len(self.targets)} {noun}s")
        for target, amount in zip(self.targets, self.amounts, strict=True):
            if not math.isfinite(amount):
                raise ValueError(f"{noun} {target} cannot be set to {amount}: give a finite number")
        if self.above is not None and not math.isfinite(self.above):
            raise ValueError(f"above={self.above} is not a finite number")
        TokenSelection.parse(self.tokens)
        if self.patches is not None and self.tokens not in ("patch", "all"):
            raise ValueError(f"patches= name patches, but tokens={self.tokens!r} leaves them out")
        if self.where is not None:
            if not isinstance(self.basis, Latents):
                raise ValueError("where= asks latents: name an SAE's latents to change")
            check_targets(list(self.where.above), self.basis.size, noun, self.basis.hook_name)
        if not self.include_error and not isinstance(self.basis, Latents):
            raise ValueError("include_error=False drops an SAE's error: name an SAE's latents")

    def at(self, places: Sequence[int]) -> Change:
        """Return the change of some of the targets alone, by their places in ``targets``."""
        return replace(
            self,
            targets=tuple(self.targets[place] for place in places),
            amounts=tuple(self.amounts[place] for place in places),
            maxima=None if self.maxima is None else tuple(self.maxima[place] for place in places),
        )

    def operate(self, coefficients: Tensor, others: Tensor | None = None) -> Tensor:
        """Return the new coefficients ``[..., m]`` of the targets.

        Args:
            coefficients: The old ones.
            others: Those of the images that a swap takes them from.
        """
        amounts = torch.tensor(self.amounts, dtype=coefficients.dtype, device=coefficients.device)
        match self.operation:
            case "add":
                new = coefficients + amounts
            case "scale":
                new = coefficients * amounts
            case "swap":
                assert others is not None
                new = others.to(coefficients)
            case _:
                new = amounts.expand_as(coefficients)
        return (
            new if self.above is None else torch.where(coefficients > self.above, new, coefficients)
        )

    def __str__(self) -> str:
        noun = _NOUNS[self.basis.kind]
        parts = [f"{self.basis} at {self.basis.hook_name}", f"tokens {self.tokens}"]
        if self.patches is not None:
            parts.append(f"{len(self.patches)} patches")
        if self.above is not None:
            parts.append(f"where above {self.above:g}")
        if self.where is not None:
            parts.append(str(self.where))
        if not self.include_error:
            parts.append("without the error")
        if self.keep_norm:
            parts.append("norm kept")
        return f"{self.operation} {noun} {self._targets()} ({', '.join(parts)})"

    def _targets(self) -> str:
        if self.operation in ("project", "swap"):
            shown = [str(target) for target in self.targets]
        else:
            sign = {"add": "by ", "scale": "by "}.get(self.operation, "to ")
            maxima = self.maxima or (None,) * len(self.targets)
            shown = [
                f"{target} {sign}{amount:g}"
                + (f" ({amount / top:g} of its maximum)" if top else "")
                for target, amount, top in zip(self.targets, self.amounts, maxima, strict=True)
            ]
        more = len(shown) - _SHOWN
        return ", ".join(shown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
