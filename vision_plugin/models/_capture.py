"""What a transcoder reads in the pass that is under way, kept until it writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Capture:
    """The activation that a dictionary encodes, where it writes at another hook than it reads.

    Args:
        model: A VisionBridge.
        hook_name: Hook that the dictionary reads.
        hook_name_out: Hook that it writes.
    """

    def __init__(self, model: Any, hook_name: str, hook_name_out: str) -> None:
        hooks = model.hook_dict
        self.model, self.hook_name, self.hook_name_out = model, hook_name, hook_name_out
        self.is_needed = hooks[hook_name] is not hooks[hook_name_out]
        self._seen: Tensor | None = None
        self._in_pass = -1

    def keep(self, activation: Tensor, hook: Any) -> None:
        """Keep the activation; the hook function where the dictionary reads."""
        del hook
        self._seen, self._in_pass = activation, self.model.n_passes

    def source(self, activation: Tensor) -> Tensor:
        """Return what the dictionary encodes when it writes over an activation.

        Raises:
            ValueError: this pass did not run the hook that the dictionary reads.
        """
        if not self.is_needed:
            return activation
        if self._seen is None or self._in_pass != self.model.n_passes:
            raise ValueError(
                f"the transcoder that writes {self.hook_name_out} reads {self.hook_name}, which "
                "this pass did not run before: start the pass at an earlier layer, or take the "
                "transcoder away"
            )
        return self._seen

    def forget(self) -> None:
        """Let go of the activation."""
        self._seen = None
