"""Hooks of this package on a bridge, which survive a reset and are removed one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformer_lens.hook_points import HookPoint, LensHandle


def permanent_hook(hook_point: HookPoint, function: Any) -> LensHandle:
    """Add a hook that survives ``reset_hooks``, and return the handle that removes it alone."""
    hook_point.add_hook(function, is_permanent=True)
    return hook_point.fwd_hooks[-1]


def remove_hook(hook_point: HookPoint, handle: LensHandle) -> None:
    """Remove one hook, even if something else has cleared the hook point before."""
    handle.hook.remove()
    if handle in hook_point.fwd_hooks:
        hook_point.fwd_hooks.remove(handle)


@contextmanager
def hooked(model: Any, functions: Mapping[str, Any]) -> Iterator[None]:
    """Run hook functions, by hook name, within a ``with`` block."""
    hooks = model.hook_dict
    handles = [(hooks[name], permanent_hook(hooks[name], run)) for name, run in functions.items()]
    try:
        yield
    finally:
        for hook_point, handle in handles:
            remove_hook(hook_point, handle)
