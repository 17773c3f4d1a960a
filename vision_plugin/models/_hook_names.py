"""Check hook names: an unknown name is an error that lists the nearest matches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownHookError(ValueError):
    """The model has no hook of this name.

    Examples:
        >>> try:
        ...     model.harvest(pixels, "blocks.2.hook_resid_pots")
        ... except vp.models.UnknownHookError as error:
        ...     print(str(error)[:66])
        demo has no hook named 'blocks.2.hook_resid_pots'. Near matches: b
    """


def check_hook_names(names: Iterable[object], known: Iterable[str], model_name: str) -> None:
    """Raise for the first name that is a string and unknown.

    Raises:
        UnknownHookError: the message gives the model, the name and its nearest matches.
    """
    known = list(known)
    members = set(known)
    for name in names:
        if isinstance(name, str) and name not in members:
            raise UnknownHookError(_message(name, known, model_name))


def _message(name: str, known: list[str], model_name: str) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    suggestion = (
        f"Near matches: {', '.join(near)}."
        if near
        else "model.hook_dict lists every name; the usual ones look like "
        "'blocks.0.hook_resid_post', 'blocks.0.attn.hook_pattern', 'blocks.0.mlp.hook_post'."
    )
    return f"{model_name} has no hook named {name!r}. {suggestion}"
