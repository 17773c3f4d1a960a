"""What an edit counts in: the latents of a dictionary, the neurons of a hook, or directions.

Each basis reads coefficients off an activation, and turns new coefficients into a new activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.models import TokenSelection
from vision_plugin.models.dictionary import Dictionary, d_out, join_heads, reconstruct
from vision_plugin.models.site import Site, hook_names, hook_width, trained_tokens
from vision_plugin.steering._editor import LatentEditor, Reading
from vision_plugin.steering._latent_change import latent_change

Operate: TypeAlias = Callable[[Tensor], Tensor]
"""Returns new coefficients ``[..., m]`` of old ones."""


@dataclass(frozen=True, eq=False)
class Latents:
    """The latents of an SAE, a transcoder or any other dictionary, at the hook it names.

    Examples:
        >>> basis = vp.steering.Latents(sae)
        >>> basis.hook_name, basis.size, basis.tokens
        ('blocks.2.hook_resid_post', 256, 'all')
    """

    dictionary: Dictionary

    kind = "latents"

    @property
    def hook_name(self) -> str:
        """Name of the hook that is edited."""
        return hook_names(self.dictionary)[1]

    @property
    def size(self) -> int:
        """Number of latents."""
        return int(self.dictionary.cfg.d_sae)

    @property
    def tokens(self) -> str:
        """Kind of token that the dictionary was trained on."""
        return trained_tokens(self.dictionary)

    def __str__(self) -> str:
        return f"latents of a {type(self.dictionary).__name__} of {self.size:,}"

    def site(self, model: Any, tokens: str, *, check_model: bool = True) -> Site:
        """Return the dictionary's site; raise ValueError if it does not fit the model."""
        return Site.of(model, self.dictionary, tokens=tokens, check_model=check_model)

    def editor(self) -> LatentEditor:
        """Return what knows the decoder's directions, to be kept while weights stay the same."""
        return LatentEditor(self.dictionary)

    def edited(
        self,
        editor: LatentEditor | None,
        source: Tensor,
        target: Tensor,
        targets: Tensor,
        operate: Operate,
        include_error: bool,
        reading: Reading | None = None,
    ) -> Tensor:
        """Return the new activation: with the error, ``x + decode(f') - decode(f)``.

        ``reading`` is what :meth:`read` returns for the source, where it is known already.
        """
        sae = self.dictionary
        source = self._as_input(source)
        flat = join_heads(target, d_out(sae))
        start = flat if include_error else reconstruct(sae, source)
        change = self._change(editor, source, targets, operate, reading)
        return (start + change.to(start.dtype)).to(target.dtype).reshape(target.shape)

    def read(self, editor: LatentEditor, source: Tensor) -> Reading:
        """Return the latents of an activation."""
        return editor.read(self._as_input(source))

    def _as_input(self, source: Tensor) -> Tensor:
        weights = getattr(self.dictionary, "W_dec", None)
        if isinstance(weights, Tensor):  # a model in half precision may have an SAE that is not
            source = source.to(weights.dtype)
        return join_heads(source, int(self.dictionary.cfg.d_in))

    def _change(
        self,
        editor: LatentEditor | None,
        source: Tensor,
        targets: Tensor,
        operate: Operate,
        reading: Reading | None,
    ) -> Tensor:
        if editor is not None and not torch.is_grad_enabled():
            reading = reading or editor.read(source)
            if editor.directions is not None:
                targets = targets.to(editor.directions.device)
                values = reading.values(targets)
                amount = operate(values) - values
                amount = amount if reading.gain is None else amount * reading.gain
                return amount @ editor.directions[targets].to(amount.dtype)
        return latent_change(self.dictionary, source, targets, operate)


class _Plain:
    """A basis that reads the activation it changes: nothing to prepare, and no error to keep."""

    hook_name: str

    def site(self, model: Any, tokens: str, *, check_model: bool = True) -> Site:
        """Return the hook's site."""
        del check_model
        model.check_hook_names([self.hook_name])
        TokenSelection.parse(tokens)
        return Site(model, self.hook_name, self.hook_name, tokens)

    def editor(self) -> None:
        """Return nothing: there is nothing to prepare."""

    def edited(
        self,
        editor: None,
        source: Tensor,
        target: Tensor,
        targets: Tensor,
        operate: Operate,
        include_error: bool,
        reading: Reading | None = None,
    ) -> Tensor:
        """Return the activation with new coefficients."""
        del editor, source, include_error, reading
        return self._changed(target, targets, operate)

    def _changed(self, target: Tensor, targets: Tensor, operate: Operate) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Neurons(_Plain):
    """The single dimensions of the activation at a hook; heads count as joined.

    Examples:
        >>> vp.steering.Neurons("blocks.2.hook_resid_post")
        Neurons(hook_name='blocks.2.hook_resid_post')
    """

    hook_name: str

    kind = "neurons"
    size = None
    tokens = "all"

    def __str__(self) -> str:
        return "neurons"

    def _changed(self, target: Tensor, targets: Tensor, operate: Operate) -> Tensor:
        flat = target
        if target.ndim == 4 and _has_heads(self.hook_name):
            flat = target.flatten(-2)
        check_targets(targets.tolist(), flat.shape[-1], "neuron", self.hook_name)
        targets = targets.to(flat.device)
        new = operate(flat[..., targets]).to(flat.dtype)
        return flat.index_copy(-1, targets, new).view_as(target)


@dataclass(frozen=True, eq=False)
class Directions(_Plain):
    """Directions in the activation at a hook, with the coefficients that are read along them.

    An activation ``x`` has the coefficients ``c = (x - offset) @ readers.T``. An edit that makes
    them ``c'`` adds ``(c' - c) @ vectors``.

    Args:
        hook_name: Hook of the activation.
        vectors: What a coefficient of 1 adds, ``[n, d]``; one direction may come as ``[d]``.
        readers: What is read, ``[n, d]``; by default the least-squares coefficients, so that
            suppressing all of them projects the vectors' span out.
        offset: Activation whose coefficients are 0, ``[d]``; the origin by default.

    Raises:
        ValueError: shapes do not fit together, or a number is not finite.

    Examples:
        >>> plane = vp.steering.Directions(hook, torch.eye(128)[:2])
        >>> plane.size
        2
        >>> print(vp.Edit.project(plane))
        project direction 0, 1 (2 directions at blocks.2.hook_resid_post, tokens all)
    """

    hook_name: str
    vectors: Float[Tensor, "n d"] | Float[Tensor, " d"]
    readers: Tensor | None = None
    offset: Tensor | None = None

    kind = "directions"
    tokens = "all"

    def __post_init__(self) -> None:
        vectors = torch.atleast_2d(self.vectors.detach())
        object.__setattr__(self, "vectors", vectors)
        if self.readers is not None and self.readers.shape != vectors.shape:
            raise ValueError(
                f"readers= is {list(self.readers.shape)}, but there are vectors= "
                f"{list(vectors.shape)}: give one reader per vector"
            )
        if self.offset is not None and self.offset.shape != vectors.shape[1:]:
            raise ValueError(
                f"offset= is {list(self.offset.shape)}, but the vectors are {vectors.shape[1]} wide"
            )
        for name in ("vectors", "readers", "offset"):
            tensor = getattr(self, name)
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}= hold NaN or infinity: leave those directions out")

    @property
    def size(self) -> int:
        """Number of directions."""
        return len(self.vectors)

    @cached_property
    def reading(self) -> Float[Tensor, "n d"]:
        """What is read: the readers given, or the vectors' pseudo-inverse."""
        if self.readers is not None:
            return self.readers.detach()
        inverse: Tensor = torch.linalg.pinv(self.vectors.double()).T.to(self.vectors.dtype)
        return inverse

    def __str__(self) -> str:
        return f"{self.size} direction{'s' if self.size > 1 else ''}"

    def site(self, model: Any, tokens: str, *, check_model: bool = True) -> Site:
        """Return the hook's site; raise ValueError if the directions have another width."""
        site = super().site(model, tokens, check_model=check_model)
        width = hook_width(model, self.hook_name)
        if width is not None and width != self.vectors.shape[1]:
            raise ValueError(
                f"the directions are {self.vectors.shape[1]} wide, but {self.hook_name} of "
                f"{model.cfg.model_name} has {width} dimensions: they belong to another model or "
                "hook"
            )
        return site

    def _changed(self, target: Tensor, targets: Tensor, operate: Operate) -> Tensor:
        flat = join_heads(target, self.vectors.shape[1])
        places = targets.to(self.vectors.device)
        readers, vectors = self.reading[places].to(flat), self.vectors[places].to(flat)
        centred = flat if self.offset is None else flat - self.offset.to(flat)
        coefficients = centred @ readers.T
        change = (operate(coefficients) - coefficients) @ vectors
        return (flat + change).view_as(target)


Basis: TypeAlias = Latents | Neurons | Directions
"""What an edit counts in."""


def basis_of(thing: Dictionary | str | Basis) -> Basis:
    """Return the basis for an SAE, the name of a hook (its neurons), or directions.

    Raises:
        ValueError: it is nothing of the kind.
    """
    if isinstance(thing, (Latents, Neurons, Directions)):
        return thing
    if isinstance(thing, str):
        return Neurons(thing)
    if isinstance(thing, Dictionary):
        hook_names(thing)
        return Latents(thing)
    raise ValueError(
        f"an edit takes an SAE, the name of a hook, or Directions(hook_name, vectors), not "
        f"{type(thing).__name__}"
    )


def check_targets(targets: Sequence[int], size: int | None, noun: str, where: str) -> None:
    """Raise ValueError if a target is out of range."""
    bad = [t for t in targets if t < 0 or (size is not None and t >= size)]
    if bad:
        there = "" if size is None else f": there are {size} at {where}, from 0"
        raise ValueError(f"{noun} {bad[0]} is out of range{there}")


def _has_heads(hook_name: str) -> bool:
    """Return whether a hook's last two axes are heads and their dimensions."""
    return hook_name.endswith(("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"))
