"""Edits at work: the hook functions that make changes while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from vision_plugin.models.site import Site, hooked, in_eval_mode
from vision_plugin.steering._basis import Latents
from vision_plugin.steering._change import Change
from vision_plugin.steering._editor import LatentEditor, Reading

T = TypeVar("T")


class Worker:
    """A change in one model, checked once and ready to be made.

    Args:
        model: A VisionBridge.
        change: The change.
        check_model: Refuse an SAE that was trained on another model.
        editor: What knows the directions of the change's SAE already; None finds them out.

    Raises:
        UnknownHookError: the model has no such hook.
        ValueError: the change does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        change: Change,
        *,
        check_model: bool = True,
        editor: LatentEditor | None = None,
    ) -> None:
        self.change = change
        self.site: Site = change.basis.site(model, change.tokens, check_model=check_model)
        self._capture = self.site.capture()
        self.editor: Any = editor or change.basis.editor()
        self.donor: Tensor | None = None
        """Activations of other images at the hook that is read, for a swap."""
        self.reading: Reading | None = None
        """Latents of the tokens that change, where somebody has read them before."""
        self._targets = torch.tensor(change.targets, dtype=torch.long)
        n_patches = int(model.token_layout().n_patches)
        bad = [patch for patch in change.patches or () if not 0 <= patch < n_patches]
        if bad:
            raise ValueError(f"patch {bad[0]} is out of range: there are {n_patches}, from 0")

    def hooks(self) -> dict[str, Callable[[Tensor, Any], Tensor | None]]:
        """Return the hook functions by hook name."""
        reads = {self.site.hook_name: self._capture.keep} if self._capture.is_needed else {}
        return {**reads, self.site.hook_name_out: self._run}

    def _run(self, activation: Tensor, hook: Any) -> Tensor:
        del hook
        return self(self._capture.source(activation), activation)

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the changed activation.

        Args:
            source: What the basis reads.
            target: What is changed; the same tensor except for a transcoder.
        """
        rows, donor = self._rows(target), self._donor_of(source)
        if rows is not None:
            given = (source, target) if donor is None else (source, target, donor)
            some = self._changed(*(x.index_select(1, rows) for x in given))
            return target.index_copy(1, rows, some)
        new = self._changed(source, target, donor)
        mask = self.site.mask(target)
        return new if mask is None else torch.where(mask, new, target)

    def read(self, activation: Tensor) -> Reading | None:
        """Return the latents of the tokens that change; None for a basis without latents."""
        basis = self.change.basis
        if not isinstance(basis, Latents):
            return None
        rows = self._rows(activation)
        return basis.read(
            self.editor, activation if rows is None else activation.index_select(1, rows)
        )

    def _changed(self, source: Tensor, target: Tensor, donor: Tensor | None = None) -> Tensor:
        """Return the changed activation of tokens that all change."""
        change, operate = self.change, self.change.operate
        if donor is not None:
            operate = partial(operate, others=self._coefficients(donor, target))
        new = change.basis.edited(
            self.editor, source, target, self._targets, operate, change.include_error, self.reading
        )
        if change.keep_norm:
            axes = tuple(range(2, target.ndim)) or (-1,)  # a token's heads belong together
            old, now = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (target, new))
            new = new * (old / now.clamp(min=torch.finfo(now.dtype).tiny))
        if change.where is None or not isinstance(change.basis, Latents):
            return new
        here = change.where.mask(change.basis.dictionary, self.editor, source)
        return torch.where(here.view(*here.shape, *[1] * (new.ndim - here.ndim)), new, target)

    def _donor_of(self, source: Tensor) -> Tensor | None:
        if self.change.operation != "swap" or self.donor is None:
            return None
        if len(self.donor) != len(source):
            raise ValueError(
                f"source= has {len(self.donor)} images for a batch of {len(source)}: give one for "
                "each"
            )
        return self.donor.to(source)

    def _coefficients(self, donor: Tensor, target: Tensor) -> Tensor:
        """Return the coefficients ``[..., m]`` of other images' activations."""
        seen: list[Tensor] = []

        def look(coefficients: Tensor) -> Tensor:
            seen.append(coefficients)
            return coefficients

        start = donor if self.site.hook_name == self.site.hook_name_out else target
        self.change.basis.edited(self.editor, donor, start, self._targets, look, True)
        return seen[0]

    def _rows(self, activation: Tensor) -> Tensor | None:
        """Return the places of the tokens that change; None for all of them, or random ones."""
        layout = self.site.model.token_layout()
        has_tokens = activation.ndim >= 3 and activation.shape[1] == layout.n_tokens
        if self.change.patches is not None:
            if not has_tokens:
                raise ValueError(
                    f"patches= need the model's {layout.n_tokens} tokens in the second dimension, "
                    f"but {self.site.hook_name_out} gives {list(activation.shape)}"
                )
            rows = layout.indices("patch")[list(self.change.patches)]
        elif self.site.tokens in ("cls", "patch", "register") and has_tokens:
            rows = layout.indices(self.site.tokens)
        else:
            return None
        there: Tensor = rows.to(activation.device)
        return there


@contextmanager
def edited(
    model: Any,
    changes: Sequence[Change],
    *,
    source: Tensor | None = None,
    check_model: bool = True,
) -> Iterator[None]:
    """Make changes while a model runs, within a ``with`` block.

    The hook functions of each block are its own: blocks nest, overlap and end in any order.

    Args:
        model: A VisionBridge.
        changes: The changes, made in this order where they meet at one hook.
        source: Pixels of the images whose values a swap takes.
        check_model: Refuse an SAE that was trained on another model.
    """
    workers = [Worker(model, change, check_model=check_model) for change in changes]
    swaps = [worker for worker in workers if worker.change.operation == "swap"]
    if swaps:
        read = require_source(source)
        names = list(dict.fromkeys(worker.site.hook_name for worker in swaps))
        with torch.no_grad(), in_eval_mode(model):
            _, found = model.run_with_cache(read, names_filter=names, return_cache_object=False)
        for worker in swaps:
            worker.donor = found[worker.site.hook_name]
    with running(model, workers):
        yield


def require_source(source: T | None) -> T:
    """Return what a swap takes values from; raise ValueError where there is nothing."""
    if source is None:
        raise ValueError("a swap takes the values of other images: give them with source=")
    return source


@contextmanager
def running(model: Any, workers: Sequence[Worker]) -> Iterator[None]:
    """Run the hook functions of workers within a ``with`` block."""
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(hooked(model, worker.hooks()))
        yield
