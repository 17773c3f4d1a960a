"""The vision tower of a vision-language model as its bridge runs it, in the native one's place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

_NOT_FOR_BLOCKS = ("output_hidden_states", "output_attentions", "return_dict")
_BEHIND_ATTENTION = re.compile(
    r"hook_(resid_mid|resid_post|attn_out|mlp_out|z|result)$|\.\d+\.hook_out$"
    r"|\.(mlp|ln2|ln1_post|ln2_post|attn\.o)\."
)
"""Hooks of a block through which no token reaches another token any more."""


@dataclass(frozen=True)
class Reach:
    """What of a tower the language model gets, and so where an edit can do something.

    Attributes:
        model_name: Name of the model in errors.
        layers: Numbers of the hidden states that are read, counted from 0; None for the tower's
            output.
        reads_cls: Whether the class token is read too.
    """

    model_name: str
    layers: tuple[int, ...] | None
    reads_cls: bool

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Names of the hooks whose activations are read."""
        if self.layers is None:
            return ("ln_final.hook_out",)
        return tuple(
            f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed"
            for layer in sorted(set(self.layers))
        )

    def check(self, hook_name: str, tokens: str) -> None:
        """Raise ValueError where a change could not reach the language model.

        Args:
            hook_name: Hook that is changed, a name of the tower.
            tokens: Kind of token that changes.
        """
        block = _block(hook_name)
        if not self._reaches(hook_name, block):
            raise ValueError(
                f"{hook_name} lies behind what the language model of {self.model_name} reads "
                f"({', '.join(self.hook_names)}), so a change there would do nothing: choose an "
                "earlier hook"
            )
        last = None if self.layers is None else max(self.layers) - 1
        at_the_end = block == last and _BEHIND_ATTENTION.search(hook_name) is not None
        if tokens == "cls" and not self.reads_cls and at_the_end:
            raise ValueError(
                f"the language model of {self.model_name} does not read the class token, and at "
                f"{hook_name} no other token reads it any more, so a change there would do "
                "nothing: choose tokens='patch', or an earlier hook"
            )

    def _reaches(self, hook_name: str, block: int | None) -> bool:
        if block is not None:
            return self.layers is None or block < max(self.layers)
        if hook_name.startswith("ln_final"):
            return self.layers is None
        return not hook_name.startswith("unembed")


class BridgedTower(nn.Module):
    """Stands where a vision-language model has its vision tower, and runs the tower's bridge.

    What hooks, splices and edits make of the hidden states is what the model reads. transformers
    records hidden states by hooks of its own on the native blocks, inside the bridge's: it would
    see them before they change.

    Args:
        vision: A VisionBridge of the tower.
        reach: What is read of it.
    """

    def __init__(self, vision: Any, reach: Reach) -> None:
        super().__init__()
        # Not as a submodule: the weights are the native tower's, and the hook names its own.
        self.__dict__["vision"] = vision
        self.reach = reach
        self.stream: Tensor | None = None
        """Residual stream in place of the pixels', for passes that begin behind ``start``."""
        self.start: int | None = None

    def __getattr__(self, name: str) -> Any:
        if "vision" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["vision"].native, name)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Run the tower's bridge; the output is the native tower's.

        Raises:
            ValueError: something changes an activation that the language model does not read.
        """
        self._check_changes()
        start = self.start
        if self.stream is not None and start is not None and self.reach.layers == (start,):
            return self._read_at_once(self.stream, start)
        wanted = kwargs.get("output_hidden_states")
        others = {name: v for name, v in kwargs.items() if name not in _NOT_FOR_BLOCKS}
        vision = self.__dict__["vision"]
        with hidden_states(vision, wanted) as states:
            data = pixel_values if self.stream is None else self.stream
            output = vision._run(data, self.start, None, None, others)
        if states:
            output["hidden_states"] = tuple(states)
        return output

    def _read_at_once(self, stream: Tensor, layer: int) -> Any:
        """Return an output whose hidden state is the stream: no later block is read."""
        states: list[Tensor | None] = [None] * (len(list(self.__dict__["vision"].blocks)) + 1)
        states[layer] = stream
        return BaseModelOutputWithPooling(hidden_states=tuple(states))  # type: ignore[arg-type]

    def _check_changes(self) -> None:
        """Check the places of attached SAEs and edits; hooks of users may only read."""
        for point in self.__dict__["vision"].hook_points():
            for handle in point.fwd_hooks:
                site = getattr(getattr(handle.user_hook, "__self__", None), "site", None)
                if site is not None:
                    self.reach.check(site.hook_name_out, site.tokens)


@contextmanager
def hidden_states(vision: Any, wanted: object) -> Iterator[list[Tensor | None]]:
    """Collect hidden states behind the bridge's hooks while its tower runs.

    Args:
        vision: A VisionBridge.
        wanted: transformers' ``output_hidden_states``: whether, or which ones by number.

    Yields:
        The embedding and each block's output, None where a state is not wanted; no states at all
        where none is.
    """
    blocks: Sequence[Any] = list(vision.blocks)
    n_states = len(blocks) + 1
    if wanted is None or wanted is False:
        yield []
        return
    if wanted is True:
        numbers = set(range(n_states))
    else:
        listed = [wanted] if isinstance(wanted, int) else list(wanted)  # type: ignore[call-overload]
        numbers = {int(number) % n_states for number in listed}
    states: list[Tensor | None] = [None] * n_states

    def first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[0] = args[0] if args else kwargs["hidden_states"]

    def keep(number: int) -> Any:
        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            states[number] = output[0] if isinstance(output, tuple) else output

        return after

    handles = [
        blocks[number - 1].register_forward_hook(keep(number)) for number in numbers if number
    ]
    if 0 in numbers:
        handles.append(blocks[0].register_forward_pre_hook(first, with_kwargs=True))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _block(hook_name: str) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    return int(match.group(1)) if match else None
