"""SAEs and edits in the tower of a vision-language model, where they can reach the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from vision_plugin.models._fit import hook_names, trained_tokens
from vision_plugin.models._vlm_tower import Reach
from vision_plugin.models.dictionary import Dictionary


class VisionSplicing:
    """The part of a vision-language bridge that attaches SAEs and edits to its tower.

    What is attached stays for the whole of a ``generate``. The hooks are the tower's, named without
    the prefix, as an SAE of the tower has them.
    """

    vision: Any
    reach: Reach

    def steer(
        self,
        sae: Dictionary | Any,
        latents: Mapping[int, float] | None = None,
        *,
        tokens: str | None = None,
        check_model: bool = True,
    ) -> AbstractContextManager[None]:
        """Set latents of an SAE, or make an Edit, within a ``with`` block.

        Args:
            sae: An SAE of the tower, or a :class:`vision_plugin.Edit`.
            latents: Value per latent.
            tokens: Kind of token; None takes the kind that the SAE was trained on.
            check_model: Refuse an SAE that was trained on another tower.

        Raises:
            ValueError: the SAE does not fit, or a change there could not reach the answers.
        """
        if hasattr(sae, "changes"):
            self._check_edit(sae)
        else:
            self._check(sae, tokens)
        steered: AbstractContextManager[None] = self.vision.steer(
            sae, latents, tokens=tokens, check_model=check_model
        )
        return steered

    def edit(self, edit: Any, *, check_model: bool = True) -> AbstractContextManager[None]:
        """Make the changes of an Edit within a ``with`` block; errors as in :meth:`steer`."""
        self._check_edit(edit)
        edited: AbstractContextManager[None] = self.vision.edit(edit, check_model=check_model)
        return edited

    def add_edit(self, edit: Any, *, check_model: bool = True) -> None:
        """Make the changes of an Edit until :meth:`reset_edits`; errors as in :meth:`steer`."""
        self._check_edit(edit)
        self.vision.add_edit(edit, check_model=check_model)

    def reset_edits(self) -> None:
        """Undo every edit of :meth:`add_edit`."""
        self.vision.reset_edits()

    def add_sae(
        self,
        sae: Dictionary,
        use_error_term: bool | None = None,
        *,
        tokens: str | None = None,
        check_model: bool = True,
    ) -> None:
        """Let activations of the tower go through an SAE until :meth:`reset_saes`.

        Arguments as in ``VisionBridge.add_sae``, errors as in :meth:`steer`.
        """
        self._check(sae, tokens)
        self.vision.add_sae(sae, use_error_term, tokens=tokens, check_model=check_model)

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Detach the SAEs at these hooks of the tower, or all of them."""
        self.vision.reset_saes(act_names)

    @contextmanager
    def saes(
        self,
        saes: Dictionary | Sequence[Dictionary] = (),
        use_error_term: bool | None = None,
        *,
        tokens: str | None = None,
        check_model: bool = True,
    ) -> Iterator[Any]:
        """Attach SAEs within a ``with`` block, then restore what was attached before."""
        several = [saes] if isinstance(saes, Dictionary) else list(saes)
        for sae in several:
            self._check(sae, tokens)
        with self.vision.saes(
            several, use_error_term=use_error_term, tokens=tokens, check_model=check_model
        ):
            yield self

    def _check(self, sae: Dictionary, tokens: str | None) -> None:
        hook_name = hook_names(sae)[1]
        self.vision.check_hook_names([hook_name])
        self.reach.check(hook_name, tokens or trained_tokens(sae))

    def _check_edit(self, edit: Any) -> None:
        for change in edit.changes:
            self.vision.check_hook_names([change.basis.hook_name])
            self.reach.check(change.basis.hook_name, change.tokens)
