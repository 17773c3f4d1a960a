"""SAEs and edits on a tower, by the same methods wherever the tower stands.

A VisionBridge attaches them to itself, a VisionLanguageBridge to the tower that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from vision_plugin.models._fit import hook_names, trained_tokens
from vision_plugin.models.dictionary import Dictionary

Bridge = TypeVar("Bridge", bound="Attaching")


class Attaching:
    """The part of a bridge that attaches SAEs and steers; a base of both kinds of bridge.

    What is attached stays for the whole of a ``generate``. SAEs and edits name hooks of the tower,
    without a prefix.
    """

    run_with_cache: Callable[..., Any]
    run_with_hooks: Callable[..., Any]

    @property
    def _tower(self) -> Any:
        """The VisionBridge that takes SAEs and edits."""
        return self

    def _check_place(self, hook_name: str, tokens: str) -> None:
        """Raise where a change of these tokens could do nothing; a tower alone shows them all."""

    def _check_sae(self, sae: Dictionary, tokens: str | None) -> None:
        self._check_place(hook_names(sae)[1], tokens or trained_tokens(sae))

    def _check_edit(self, edit: Any) -> None:
        for change in edit.changes:
            self._check_place(change.basis.hook_name, change.tokens)

    # ------------------------------------------------------------------ SAEs

    def add_sae(
        self,
        sae: Dictionary,
        use_error_term: bool | None = None,
        *,
        tokens: str | None = None,
        check_model: bool = True,
    ) -> None:
        """Attach an SAE or a transcoder until :meth:`reset_saes`.

        The SAE's reconstruction replaces the activations at its hook; the error term adds the
        reconstruction's error back. A new SAE replaces the one at the same hook.

        Args:
            sae: SAE whose metadata names its hook (``hook_name``, also ``hook_name_out`` for a
                transcoder).
            use_error_term: Whether to add the error back; None takes the SAE's own setting.
            tokens: Kind of token that goes through the SAE; None takes the kind of its training.
            check_model: Refuse an SAE that was trained on another model.

        Raises:
            UnknownHookError: the model has no such hook.
            ValueError: width, model or kind of token do not fit; the message names both sides. A
                language model does not read what the SAE changes.
        """
        self._check_sae(sae, tokens)
        self._tower._attach_sae(sae, use_error_term, tokens, check_model)

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Detach the SAEs at these hooks, or all of them.

        Raises:
            ValueError: no SAE is attached at one of the names.
        """
        self._tower._detach_saes(act_names)

    @contextmanager
    def saes(
        self,
        saes: Dictionary | Sequence[Dictionary] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        *,
        tokens: str | None = None,
        check_model: bool = True,
    ) -> Iterator[Any]:
        """Attach SAEs within a ``with`` block, then restore the SAEs that were attached before."""
        tower = self._tower
        before = dict(tower._splices)
        try:
            for sae in [saes] if isinstance(saes, Dictionary) else saes:
                self.add_sae(sae, use_error_term, tokens=tokens, check_model=check_model)
            yield self
        finally:
            if reset_saes_end:
                tower._restore(before)

    def run_with_saes(
        self,
        *args: Any,
        saes: Dictionary | Sequence[Dictionary] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        tokens: str | None = None,
        check_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run the forward pass with SAEs attached."""
        options = {"tokens": tokens, "check_model": check_model}
        with self._alone_with(saes, reset_saes_end, use_error_term, options):
            return self(*args, **kwargs)  # type: ignore[operator]

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: Dictionary | Sequence[Dictionary] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        tokens: str | None = None,
        check_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run ``run_with_cache`` with SAEs attached; the cache holds their latents too."""
        options = {"tokens": tokens, "check_model": check_model}
        with self._alone_with(saes, reset_saes_end, use_error_term, options):
            return self.run_with_cache(*args, **kwargs)

    def run_with_hooks_with_saes(
        self,
        *args: Any,
        saes: Dictionary | Sequence[Dictionary] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        tokens: str | None = None,
        check_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run ``run_with_hooks`` with SAEs attached; their latents can be hooked by name."""
        options = {"tokens": tokens, "check_model": check_model}
        with self._alone_with(saes, reset_saes_end, use_error_term, options):
            return self.run_with_hooks(*args, **kwargs)

    @contextmanager
    def _alone_with(
        self, saes: Any, reset_saes_end: bool, use_error_term: bool | None, options: dict[str, Any]
    ) -> Iterator[None]:
        with self._tower.alone(), self.saes(saes, reset_saes_end, use_error_term, **options):
            yield

    # ------------------------------------------------------------------ edits

    def steer(
        self,
        sae: Dictionary | Any,
        latents: Mapping[int, float] | None = None,
        *,
        tokens: str | None = None,
        check_model: bool = True,
    ) -> AbstractContextManager[None]:
        """Clamp latents, or make an Edit; see :func:`vision_plugin.steering.steer`."""
        steering = _steering()
        if isinstance(sae, steering.Edit):
            self._check_edit(sae)
        else:
            self._check_sae(sae, tokens)
        steered: AbstractContextManager[None] = steering.steer(
            self._tower, sae, latents, tokens=tokens, check_model=check_model
        )
        return steered

    def edit(
        self, edit: Any, *, source: Any = None, check_model: bool = True
    ) -> AbstractContextManager[None]:
        """Make the changes of a :class:`vision_plugin.Edit` within a ``with`` block.

        Args:
            edit: The edit.
            source: Pixels of the images whose values a swap takes, one for each image of a batch.
            check_model: Refuse an SAE that was trained on another model.

        Raises:
            ValueError: the edit does not fit the model, or a language model does not read what it
                changes.
        """
        self._check_edit(edit)
        edited: AbstractContextManager[None] = edit.on(
            self._tower, source=source, check_model=check_model
        )
        return edited

    def add_edit(self, edit: Any, *, check_model: bool = True) -> None:
        """Make the changes of a :class:`vision_plugin.Edit` until :meth:`reset_edits`."""
        self._check_edit(edit)
        self._tower._attach_edit(edit, check_model)

    def reset_edits(self) -> None:
        """Undo every edit of :meth:`add_edit`."""
        self._tower._detach_edits()


def mended(model: Bridge, edit: str | Path, *, device: torch.device) -> Bridge:
    """Return a bridge that makes an edit from a file until :meth:`Attaching.reset_edits`.

    Args:
        model: The bridge.
        edit: JSON file of the edit.
        device: Device of its SAEs.
    """
    model.add_edit(_steering().Edit.load(edit, device=device))
    return model


def _steering() -> Any:
    return import_module("vision_plugin.steering")  # it is above this folder: found by name
