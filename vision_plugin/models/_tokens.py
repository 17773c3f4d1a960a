"""Kinds of tokens: which rows of the residual stream are CLS, registers and patches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vision_plugin._shown import shown

KINDS = ("cls", "patch", "register", "all")


@dataclass(frozen=True)
class TokenLayout:
    """Order of a vision transformer's tokens: CLS, registers, then patches row by row.

    Examples:
        >>> layout = vp.models.TokenLayout(n_cls=1, n_registers=0, grid=(2, 2))
        >>> layout.kinds
        ('cls', 'patch', 'patch', 'patch', 'patch')
        >>> layout.indices("patch").tolist()
        [1, 2, 3, 4]
    """

    n_cls: int
    """Class tokens at the front: 1, or 0 in towers without one, or 2 with a distillation token."""
    n_registers: int
    grid: tuple[int, int]
    """Rows and columns of the patch grid."""

    @property
    def n_patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Length of the residual stream."""
        return self.n_cls + self.n_registers + self.n_patches

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each token: ``"cls"``, ``"register"`` or ``"patch"``."""
        counts = {"cls": self.n_cls, "register": self.n_registers, "patch": self.n_patches}
        return tuple(kind for kind, count in counts.items() for _ in range(count))

    def indices(self, kind: str) -> Int[Tensor, "selected"]:
        """Return the rows of one kind, ascending.

        Args:
            kind: ``"cls"``, ``"patch"``, ``"register"`` or ``"all"``.

        Raises:
            ValueError: the kind is unknown, or the model has no token of it.
        """
        first_patch = self.n_cls + self.n_registers
        ranges = {
            "cls": range(self.n_cls),
            "register": range(self.n_cls, first_patch),
            "patch": range(first_patch, self.n_tokens),
            "all": range(self.n_tokens),
        }
        if kind not in ranges:
            raise ValueError(
                f"unknown kind of token {kind!r}: use 'cls', 'patch', 'register', 'all' or "
                "'random:n' with a number n"
            )
        rows = torch.tensor(list(ranges[kind]), dtype=torch.long)
        if len(rows) == 0:
            raise ValueError(
                f"this model has no {kind!r} token: its {self.n_tokens} tokens are {self.n_cls} "
                f"cls, {self.n_registers} register and {self.n_patches} patch"
            )
        return rows

    def mask(self, kind: str) -> Bool[Tensor, "tokens"]:
        """Return a mask that is True at the rows of one kind."""
        mask = torch.zeros(self.n_tokens, dtype=torch.bool)
        mask[self.indices(kind)] = True
        return mask


@dataclass(frozen=True)
class TokenSelection:
    """A parsed ``tokens=`` argument: one kind of token, or n random tokens per image.

    Attributes:
        kind: ``cls``, ``patch``, ``register``, ``all`` or ``random``.
        n_random: Number of random tokens per image; None for a kind.

    Examples:
        >>> layout = vp.models.TokenLayout(n_cls=1, n_registers=0, grid=(2, 2))
        >>> vp.models.TokenSelection.parse("patch").rows(layout, batch=1).tolist()
        [[1, 2, 3, 4]]
        >>> vp.models.TokenSelection.parse("random:3").rows(layout, batch=2).shape
        torch.Size([2, 3])
    """

    kind: str
    n_random: int | None = None

    @classmethod
    def parse(cls, tokens: str) -> TokenSelection:
        """Read ``"cls"``, ``"patch"``, ``"register"``, ``"all"`` or ``"random:n"``.

        Raises:
            ValueError: the text is none of these.
        """
        if tokens in KINDS:
            return cls(tokens)
        match = re.fullmatch(r"random:([1-9][0-9]*)", tokens)
        if match is None:
            raise ValueError(
                f"tokens={shown(tokens)} is not a kind of token: use 'cls', 'patch', 'register', "
                "'all' or 'random:n' with a number n of 1 or more"
            )
        return cls("all", int(match.group(1)))

    def rows(
        self, layout: TokenLayout, batch: int, generator: torch.Generator | None = None
    ) -> Int[Tensor, "batch selected"]:
        """Return the selected rows of each image, ascending.

        Args:
            layout: Order of the model's tokens.
            batch: Number of images.
            generator: Draws the rows of ``random:n``; None takes torch's global generator.

        Raises:
            ValueError: ``random:n`` asks for more rows than the model has tokens.
        """
        rows = layout.indices(self.kind)
        if self.n_random is None:
            return rows.expand(batch, -1)
        if self.n_random > len(rows):
            raise ValueError(
                f"tokens='random:{self.n_random}' asks for more tokens than the model's {len(rows)}"
            )
        order = torch.rand(batch, len(rows), generator=generator).argsort(dim=1)
        return order[:, : self.n_random].sort(dim=1).values

    def mask(
        self, layout: TokenLayout, batch: int, generator: torch.Generator | None = None
    ) -> Bool[Tensor, "batch tokens"]:
        """Return a mask that is True at the selected rows of each image."""
        mask = torch.zeros(batch, layout.n_tokens, dtype=torch.bool)
        return mask.scatter_(1, self.rows(layout, batch, generator), True)
