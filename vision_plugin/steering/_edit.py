"""An edit of a model's activations as one object: what changes, by how much, where and when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering._attach import edited
from vision_plugin.steering._basis import Basis, Directions, Latents, basis_of, check_targets
from vision_plugin.steering._change import Change, Operation
from vision_plugin.steering._edit_json import read_changes, to_dict, write_changes
from vision_plugin.steering._where import Where

Place: TypeAlias = Dictionary | str | Basis
"""What is edited: an SAE, the name of a hook whose neurons are meant, or directions."""


@dataclass(frozen=True, eq=False)
class Edit:
    """Changes of a model's activations, made one after the other; edits add with ``+``.

    Latents are those of an SAE, which knows its hook. The name of a hook in place of an SAE stands
    for the hook's neurons, and ``Directions(hook_name, vectors)`` for directions there.

    Attributes:
        changes: The changes, in order.

    Examples:
        >>> edit = vp.Edit.clamp("blocks.1.hook_resid_post", {4: 9.0}, tokens="cls")
        >>> print(edit + vp.Edit.scale("blocks.2.hook_mlp_out", {7: 0.5}))
        clamp neuron 4 to 9 (neurons at blocks.1.hook_resid_post, tokens cls)
        scale neuron 7 by 0.5 (neurons at blocks.2.hook_mlp_out, tokens all)
        >>> with model.edit(edit):
        ...     edited = model.encode_image(pixels)
        >>> torch.equal(edited, embeddings)
        False
    """

    changes: tuple[Change, ...] = ()

    # ------------------------------------------------------------------ kinds

    @classmethod
    def clamp(cls, place: Place, values: Mapping[int, float], **options: Any) -> Edit:
        """Set latents to values.

        Args:
            place: An SAE, the name of a hook, or directions.
            values: Value per latent, neuron or direction.
            **options: See :meth:`Edit.of`.
        """
        return cls.of("clamp", place, values, **options)

    @classmethod
    def add(cls, place: Place, values: Mapping[int, float], **options: Any) -> Edit:
        """Add values to latents; arguments as in :meth:`clamp`."""
        return cls.of("add", place, values, **options)

    @classmethod
    def scale(cls, place: Place, factors: Mapping[int, float], **options: Any) -> Edit:
        """Multiply latents by factors; arguments as in :meth:`clamp`."""
        return cls.of("scale", place, factors, **options)

    @classmethod
    def suppress(
        cls,
        place: Place,
        targets: Iterable[int] | None = None,
        *,
        to: float | Mapping[int, float] | Tensor = 0.0,
        **options: Any,
    ) -> Edit:
        """Set latents to 0, or to what they are on clean images.

        Args:
            place: An SAE, the name of a hook, or directions.
            targets: Numbers of the latents; None takes every direction.
            to: Value of all, value per latent, or a tensor with one value for each latent there is.
            **options: See :meth:`Edit.of`.
        """
        basis = basis_of(place)
        chosen = _all_or(targets, basis)
        if isinstance(to, (int, float)):
            return cls.of("suppress", basis, dict.fromkeys(chosen, float(to)), **options)
        missing = [t for t in chosen if isinstance(to, Mapping) and t not in to]
        if missing:
            raise ValueError(f"to= has no value for {missing[0]}: give one for each latent")
        return cls.of("suppress", basis, {t: float(to[t]) for t in chosen}, **options)

    @classmethod
    def project(
        cls,
        place: Place,
        targets: Iterable[int] | None = None,
        *,
        centre: Tensor | None = None,
        **options: Any,
    ) -> Edit:
        """Project directions, or the subspace that several span, out of an activation.

        Args:
            place: Directions, or an SAE whose latents' decoder directions are meant.
            targets: Numbers of the directions; None takes every one.
            centre: Activation ``[d]`` onto whose coefficients the others are projected; the origin
                by default.
            **options: See :meth:`Edit.of`.
        """
        basis = basis_of(place)
        chosen = _all_or(targets, basis)
        if isinstance(basis, Latents):
            check_targets(chosen, basis.size, "latent", basis.hook_name)
            options.setdefault("tokens", basis.tokens)
            rows = basis.dictionary.W_dec.detach()[chosen]  # type: ignore[attr-defined]
            basis = Directions(basis.hook_name, rows.clone(), offset=centre)
        elif isinstance(basis, Directions):
            readers = None if basis.readers is None else basis.readers[chosen]
            offset = basis.offset if centre is None else centre
            basis = Directions(basis.hook_name, basis.vectors[chosen], readers, offset)
        else:
            raise ValueError("project= needs directions or an SAE: suppress() sets neurons to 0")
        return cls.of("project", basis, dict.fromkeys(range(len(chosen)), 0.0), **options)

    @classmethod
    def swap(cls, place: Place, targets: Iterable[int] | None = None, **options: Any) -> Edit:
        """Give latents the values that they have in other images, token by token.

        This is an interchange intervention. The other images are named where the edit is made:
        ``model.edit(edit, source=pixels)``, one for each image of a batch.

        Args:
            place: An SAE, the name of a hook, or directions.
            targets: Numbers of the latents; None takes every direction.
            **options: See :meth:`Edit.of`.
        """
        basis = basis_of(place)
        return cls.of(
            "swap", basis, dict.fromkeys(_all_or(targets, basis, "to swap"), 0.0), **options
        )

    @classmethod
    def of(
        cls,
        operation: Operation,
        place: Place,
        values: Mapping[int, float],
        *,
        tokens: str | None = None,
        patches: Sequence[int] | None = None,
        above: float | None = None,
        where: Where | None = None,
        maxima: Mapping[int, float] | Tensor | None = None,
        include_error: bool = True,
        keep_norm: bool = False,
    ) -> Edit:
        """Return an edit of one change.

        Args:
            operation: ``"clamp"``, ``"add"``, ``"scale"``, ``"suppress"``, ``"project"`` or
                ``"swap"``.
            place: An SAE, the name of a hook, or directions.
            values: Amount per latent, neuron or direction.
            tokens: ``"cls"``, ``"patch"``, ``"register"``, ``"all"`` or ``"random:n"``; None takes
                the kind that the SAE was trained on, and all tokens for neurons and directions.
            patches: Numbers of the only patches to change, row by row from the top left.
            above: Change a latent only where it is above this value.
            where: Change only tokens on which some latents of the SAE fire, or all the others.
            maxima: Largest value of each latent: the amounts are then multiples of it.
            include_error: Whether to add the SAE's reconstruction error back.
            keep_norm: Whether to scale each changed token back to its norm.

        Raises:
            ValueError: a latent is out of range, an amount is not finite, or options contradict
                each other.
        """
        basis = basis_of(place)
        targets = tuple(int(target) for target in values)
        amounts = tuple(float(value) for value in values.values())
        tops = None
        if maxima is not None:
            if operation in ("scale", "project", "swap"):
                raise ValueError(f"maxima= has no meaning for {operation}: leave it out")
            tops = tuple(float(maxima[target]) for target in targets)
            amounts = tuple(amount * top for amount, top in zip(amounts, tops, strict=True))
        places = None if patches is None else tuple(int(patch) for patch in patches)
        return cls(
            (
                Change(
                    operation=operation,
                    basis=basis,
                    targets=targets,
                    amounts=amounts,
                    maxima=tops,
                    tokens=basis.tokens if tokens is None else tokens,
                    patches=places,
                    above=above,
                    where=where,
                    include_error=include_error,
                    keep_norm=keep_norm,
                ),
            )
        )

    # ------------------------------------------------------------------ one with another

    def __add__(self, other: Edit) -> Edit:
        """Return an edit that makes the changes of both, in order."""
        return Edit(self.changes + other.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def with_tokens(self, tokens: str) -> Edit:
        """Return the same edit on another kind of token."""
        return Edit(tuple(replace(change, tokens=tokens) for change in self.changes))

    def only(self, dictionary: Dictionary, latents: Iterable[int]) -> Edit:
        """Return the part of the edit that changes some latents of a dictionary.

        Args:
            dictionary: One of :attr:`dictionaries`.
            latents: Numbers of the latents to keep; the edit need not change all of them.
        """
        kept, wanted = [], set(latents)
        for change in self.changes:
            if not isinstance(change.basis, Latents) or change.basis.dictionary is not dictionary:
                continue
            places = [place for place, t in enumerate(change.targets) if t in wanted]
            if places:
                kept.append(change.at(places))
        return Edit(tuple(kept))

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Names of the hooks that are edited, each once."""
        return tuple(dict.fromkeys(change.basis.hook_name for change in self.changes))

    @property
    def dictionaries(self) -> list[Dictionary]:
        """The SAEs whose latents are edited, each once."""
        found = [c.basis.dictionary for c in self.changes if isinstance(c.basis, Latents)]
        return list({id(dictionary): dictionary for dictionary in found}.values())

    def __str__(self) -> str:
        return "\n".join(map(str, self.changes)) or "no change"

    def __repr__(self) -> str:
        return f"Edit({'; '.join(map(str, self.changes)) or 'no change'})"

    # ------------------------------------------------------------------ on a model, on disk

    def on(
        self, model: Any, *, source: Tensor | None = None, check_model: bool = True
    ) -> AbstractContextManager[None]:
        """Make the changes within a ``with`` block: what ``model.edit(edit)`` is short for.

        Args:
            model: A VisionBridge.
            source: Pixels of the images whose values a swap takes, one for each image of a batch.
            check_model: Refuse an SAE that was trained on another model.

        Raises:
            ValueError: the edit does not fit the model, or a swap has no ``source=``.
        """
        return edited(model, self.changes, source=source, check_model=check_model)

    def to_dict(self, *, sae: str | Mapping[str, Dictionary] | None = None) -> dict[str, Any]:
        """Return the edit ready for JSON; see :meth:`save`."""
        return to_dict(self.changes, sae=sae)

    def save(
        self, path: str | Path, *, sae: str | Path | Mapping[str, Dictionary] | None = None
    ) -> None:
        """Write the edit as JSON.

        Args:
            path: File to write; an earlier edit in it is replaced.
            sae: Where the SAE lies, written down for :meth:`load`; a relative path counts from the
                folder of the file. An edit of several SAEs takes a mapping from places to them.

        Raises:
            FileExistsError: something else has the name.
        """
        write_changes(self.changes, path, sae=str(sae) if isinstance(sae, Path) else sae)

    @classmethod
    def load(cls, path: str | Path, *, sae: Any = None, device: str | torch.device = "cpu") -> Edit:
        """Read an edit that :meth:`save` wrote.

        Args:
            path: The JSON file.
            sae: The SAE, or several where the edit has latents of several; None loads it from where
                the file says that it lies.
            device: Device to load SAEs onto.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not an edit, or the SAE is another one than the edit's.
        """
        return cls(read_changes(path, sae=sae, device=device))


def _all_or(
    targets: Iterable[int] | None, basis: Basis, what_for: str = "to take away"
) -> list[int]:
    if targets is not None:
        return [int(target) for target in targets]
    if not isinstance(basis, Directions):
        raise ValueError(f"name the {basis.kind} {what_for}")
    return list(range(basis.size))
