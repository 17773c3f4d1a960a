"""Rebuild small parts of a native module, so that every canonical hook has a module.

The bridge's copy of the module changes, never the user's module, and the arithmetic stays the same
bit for bit: the same kernels run on the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class LinearSlice(nn.Module):
    """Some rows of a fused projection, as a linear layer that shares the weights."""

    def __init__(self, fused: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        # Not a submodule: the parameters belong to the fused projection.
        self.__dict__["fused"] = fused
        self.start, self.stop = start, stop

    @property
    def weight(self) -> Tensor:
        """Rows of the fused weight, [out_features, in_features]."""
        weight: Tensor = self.__dict__["fused"].weight
        return weight[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """Rows of the fused bias, [out_features], or None."""
        bias = self.__dict__["fused"].bias
        return None if bias is None else bias[self.start : self.stop]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.stop - self.start

    def forward(self, x: Tensor, seen: Tensor | None = None, piece: Tensor | None = None) -> Tensor:
        """Return the slice's ``piece`` of the fused output for ``seen`` if x is still that tensor.

        If a hook replaced the input, the slice projects it anew.
        """
        if piece is not None and x is seen:
            return piece
        return nn.functional.linear(x, self.weight, self.bias)


class SplitLinear(nn.Module):
    """A fused projection whose parts hooks can read and edit one by one.

    Args:
        fused: The projection, with ``weight`` and ``bias`` like ``nn.Linear``.
        parts: Width of each part by name, in the order of the rows.
        called: Whether the native forward calls a module at this place. Where it uses the weights
            directly, plain hooks on the native module cannot read the projection.
    """

    def __init__(self, fused: nn.Module, parts: Mapping[str, int], *, called: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.called = called
        self.spans: dict[str, tuple[int, int]] = {}
        start = 0
        for name, width in parts.items():
            self.spans[name] = (start, start + width)
            self.add_module(name, LinearSlice(fused, start, start + width))
            start += width

    @property
    def weight(self) -> Tensor:
        """The fused weight."""
        weight: Tensor = self.fused.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The fused bias."""
        bias: Tensor | None = self.fused.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Project once, pass each part to its hooks, and join the parts again if one was edited."""
        output: Tensor = self.fused(x)
        pieces = {name: output[..., start:stop] for name, (start, stop) in self.spans.items()}
        shown = [self._modules[name](x, x, piece) for name, piece in pieces.items()]  # type: ignore[misc]
        if all(after is before for after, before in zip(shown, pieces.values(), strict=True)):
            return output
        return torch.cat(shown, dim=-1)


class FusedWeights(nn.Module):
    """A projection whose weight and biases are bare parameters of the native module.

    Args:
        weight: Weight, [out, in].
        biases: Parts of the bias in order, joined on each call; empty for none.
        separate: Whether to add the bias after the product and not in one call with it.
    """

    def __init__(self, weight: Tensor, biases: list[Tensor], *, separate: bool = False) -> None:
        super().__init__()
        _adopt(self, "weight", weight)
        for number, bias in enumerate(biases):
            _adopt(self, f"bias_{number}", bias)
        self.n_biases = len(biases)
        self.separate = separate

    @property
    def bias(self) -> Tensor | None:
        """The joined bias, [out], or None."""
        if self.n_biases == 0:
            return None
        parts: list[Tensor] = [getattr(self, f"bias_{number}") for number in range(self.n_biases)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., in] to [..., out]."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        if self.separate and self.bias is not None:
            output = nn.functional.linear(x, weight)
            output += self.bias
            return output
        return nn.functional.linear(x, weight, self.bias)


class MatrixProduct(nn.Module):
    """``x @ matrix`` for a matrix that is a bare parameter of the native module."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        _adopt(self, "matrix", matrix)

    @property
    def weight(self) -> Tensor:
        """The transposed matrix, as a linear layer has it, [out, in]."""
        matrix: Tensor = self.matrix  # type: ignore[assignment]
        return matrix.T

    bias = None

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., in] to [..., out]."""
        return x @ self.matrix  # type: ignore[operator, no-any-return]


class Scaled(nn.Module):
    """A LayerScale that is a bare vector of the native block, then the module after it."""

    def __init__(self, gamma: Tensor, then: nn.Module) -> None:
        super().__init__()
        self.scale = Scale(gamma)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        """Scale, then run the next module."""
        output: Tensor = self.then(self.scale(x))
        return output


class Scale(nn.Module):
    """``gamma * x``."""

    def __init__(self, gamma: Tensor) -> None:
        super().__init__()
        _adopt(self, "gamma", gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each dimension."""
        return self.gamma * x  # type: ignore[operator, no-any-return]


class BlockStack(nn.Module):
    """Blocks of an ``nn.Sequential`` that the native module calls as one."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks.children())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order."""
        for block in self.layers:
            x = block(x)
        return x


class PositionTap(nn.Module):
    """A module through which a position embedding that is a bare parameter passes."""

    def forward(self, table: Tensor, *, spread: bool = True) -> Tensor:
        """Return the table; ``spread`` tells the bridge to repeat it for each image."""
        del spread
        return table


@dataclass
class TapState:
    """Whether reads of the positions go through the tap now, and what the tap returned."""

    open: bool = False
    tapped: Tensor | None = None


def tap_positions(
    owner: nn.Module,
    attribute: str | None = None,
    entry: str = "forward",
    *,
    resample: str | None = None,
) -> None:
    """Pass a position embedding that is a bare parameter through ``owner.position_tap``.

    While ``owner.<entry>`` runs, reading ``owner.<attribute>`` returns the tap's output, computed
    once per run; at any other time it returns the parameter.

    Args:
        owner: The module that has the parameter.
        attribute: Name of the parameter; None where only its resampled form is read.
        entry: Name of the method that reads it.
        resample: Name of the method that resamples it to another image size; the tap then gets
            that method's result.
    """
    native = type(owner)
    owner.position_tap = PositionTap()
    owner.__dict__["tap_state"] = TapState()

    def read(self: Any) -> Tensor:
        table: Tensor = self._parameters[attribute]
        state: TapState = self.tap_state
        if not state.open:
            return table
        if state.tapped is None:
            spread = not getattr(self, "dynamic_img_size", False)
            batched = table if table.ndim == 3 else table.unsqueeze(0)
            state.tapped = self.position_tap(batched, spread=spread)
        return state.tapped

    def enter(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.tap_state = TapState(open=True)
        try:
            return getattr(super(tapped_class, self), entry)(*args, **kwargs)
        finally:
            self.tap_state = TapState()

    def interpolate(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        was_open, self.tap_state.open = self.tap_state.open, False
        try:
            table = getattr(super(tapped_class, self), str(resample))(*args, **kwargs)
        finally:
            self.tap_state.open = was_open
        tapped: Tensor = self.position_tap(table)
        return tapped

    members: dict[str, Any] = {} if attribute is None else {attribute: property(read), entry: enter}
    if resample is not None:
        members[resample] = interpolate
    tapped_class = type(native.__name__, (native,), members)
    owner.__class__ = tapped_class


def _adopt(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter or buffer that another module also owns."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor, persistent=False)
