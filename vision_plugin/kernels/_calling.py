"""Make ``torch.library`` operators, and call them at little cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_now: dict[Any, Callable[..., Any]] = {}  # operator -> the function behind it


def operator(name: str, *, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a ``torch.library`` operator of a function."""

    def make(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(name, mutates_args=(), schema=schema)(function)
        _now[made] = function
        return made

    return make


def call(made: Any, *arguments: Any) -> Any:
    """Call an operator, or the function behind it where nothing would notice the difference.

    An operator costs the host tens of microseconds, for gradients, tracing and modes. Where none of
    these is on, the function does the same at once.
    """
    if torch.compiler.is_compiling() or not _unwatched(arguments):
        return made(*arguments)
    return _now[made](*arguments)


def _unwatched(arguments: tuple[Any, ...]) -> bool:
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    gradients = torch.is_grad_enabled()
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            type(argument) not in _PLAIN or (gradients and argument.requires_grad)
        ):
            return False
    return True
