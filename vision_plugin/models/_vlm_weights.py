"""The weights of a vision-language bridge, which the native module owns and both parts borrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vision_plugin.models._weights import Loan, loans

Bridge = TypeVar("Bridge", bound="VisionLanguageWeights")


class VisionLanguageWeights:
    """The part of a vision-language bridge that holds weights."""

    cfg: Any
    language: Any
    native: nn.Module
    original_model: Any
    vision: Any

    def _setup_weights(self) -> None:
        structure = chain(self.original_model.modules(), self.language.modules())
        self._loans: list[Loan] = loans(self.native, structure)
        self._renew_loans()

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, or of the first weight that is not offloaded."""
        weights = chain([self._embedding], self.native.parameters())
        return next((w.device for w in weights if w.device.type != "meta"), torch.device("cpu"))

    @property
    def _embedding(self) -> Tensor:
        native: Any = self.native
        weight: Tensor = native.get_input_embeddings().weight
        return weight

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules of both bridges."""
        return chain(self.language.modules(), self.vision.modules())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the native module's parameters."""
        return self.native.parameters()

    def to(self: Bridge, *args: Any, **kwargs: Any) -> Bridge:
        """Move or cast the weights, as torch's ``to`` does."""
        self.native.to(*args, **kwargs)
        self._renew_loans()
        self.cfg.device, self.cfg.dtype = str(self.device), self._embedding.dtype
        self.vision.cfg.device, self.vision.cfg.dtype = str(self.vision.device), self.vision.dtype
        return self

    def train(self: Bridge, mode: bool = True) -> Bridge:
        """Switch the mode of every part; answers are written in eval mode in any case."""
        self.native.train(mode)
        self.original_model.train(mode)
        self.language.train(mode)
        self.vision.train(mode)
        return self

    def eval(self: Bridge) -> Bridge:
        """Switch to eval mode."""
        return self.train(False)

    def _renew_loans(self) -> None:
        for loan in self._loans:
            loan.renew()
        # TransformerLens gives a head without bias one of zeros, of a type of its own.
        model: Any = self.original_model
        head = model.get_output_embeddings()
        head = getattr(head, "original_component", head)
        bias = getattr(head, "bias", None)
        if isinstance(bias, nn.Parameter) and head.weight.device.type == "meta":
            head.bias = None  # what brings offloaded weights back knows none of that name
        elif isinstance(bias, nn.Parameter) and bias.dtype != head.weight.dtype:
            bias.data = bias.data.to(head.weight)
        self.vision._renew_loans()

    # ------------------------------------------------------------------ as a torch module

    def half(self: Bridge) -> Bridge:
        """Cast the weights to float16."""
        return self.to(torch.float16)

    def bfloat16(self: Bridge) -> Bridge:
        """Cast the weights to bfloat16."""
        return self.to(torch.bfloat16)

    def float(self: Bridge) -> Bridge:
        """Cast the weights to float32."""
        return self.to(torch.float32)

    def double(self: Bridge) -> Bridge:
        """Cast the weights to float64."""
        return self.to(torch.float64)

    def cpu(self: Bridge) -> Bridge:
        """Move the weights to the CPU."""
        return self.to("cpu")

    def cuda(self: Bridge, device: int | torch.device | None = None) -> Bridge:
        """Move the weights to a GPU, the current one by default."""
        return self.to(
            torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
        )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the native module's parameters with their native names."""
        return self.native.named_parameters(*args, **kwargs)

    def requires_grad_(self: Bridge, requires_grad: bool = True) -> Bridge:
        """Let gradients reach the weights, or not."""
        self.native.requires_grad_(requires_grad)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the native module's state, under the native module's names."""
        return self.native.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state into the native module, and so into both bridges."""
        result = self.native.load_state_dict(state_dict, *args, **kwargs)
        self._renew_loans()
        return result
