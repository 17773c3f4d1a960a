"""Attach sparse autoencoders to a bridge, under HookedSAETransformer's names.

An attached SAE is a permanent hook function on the existing hook point. So hook points and their
aliases stay, and removing the SAE leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle

from vision_plugin.models._attaching import Attaching
from vision_plugin.models._own_hooks import permanent_hook, remove_hook
from vision_plugin.models._tokens import TokenLayout
from vision_plugin.models.dictionary import (
    Dictionary,
    d_out,
    join_heads,
    reconstruct,
    silent_hooks,
)
from vision_plugin.models.site import Site


class Splicing(Attaching):
    """The part of a bridge that SAEs and edits are attached to; a base of VisionBridge."""

    hook_dict: Any
    cfg: Any
    check_hook_names: Callable[[Sequence[object]], None]
    token_layout: Callable[..., TokenLayout]
    alone: Callable[[], AbstractContextManager[Any]]

    def _setup_splicing(self) -> None:
        self._splices: dict[str, Splice] = {}
        self._standing_edits = ExitStack()
        self._edits: list[Any] = []
        self._edit_handles: set[int] = set()

    def _spliced(self) -> list[tuple[Dictionary, str, bool]]:
        """Return what it takes to attach the same SAEs to another bridge, in order."""
        splices = self._splices.values()
        return [(splice.sae, splice.site.tokens, splice.use_error_term) for splice in splices]

    def _user_hooks(self) -> list[tuple[str, Literal["fwd", "bwd"], Callable[..., Any], bool]]:
        """Return the hooks on the model's own points, except those of splices and standing edits.

        Hooks on an attached SAE's points are the SAE's.
        """
        ours = {id(handle) for splice in self._splices.values() for _, handle in splice.handles}
        ours |= self._edit_handles
        found: list[tuple[str, Literal["fwd", "bwd"], Callable[..., Any], bool]] = []
        inner = {id(point) for point in self.splice_hooks().values()}
        named = [pair for pair in self.hook_dict.items() if id(pair[1]) not in inner]
        points = {id(point): (name, point) for name, point in reversed(named)}
        for name, point in points.values():
            for direction, handles in (("fwd", point.fwd_hooks), ("bwd", point.bwd_hooks)):
                found += [
                    (name, direction, handle.user_hook, handle.is_permanent)  # type: ignore[misc]
                    for handle in handles
                    if id(handle) not in ours and handle.user_hook is not None
                ]
        return found

    # ------------------------------------------------------------------ hooks of attached SAEs

    def hook_points(self) -> list[HookPoint]:
        """Return every hook point, those in attached SAEs included."""
        points: Iterable[HookPoint] = super().hook_points()  # type: ignore[misc]
        return [*points, *self.splice_hooks().values()]

    def clear_contexts(self) -> None:
        """Clear what hooks stored on every hook point."""
        for point in self.hook_points():
            point.clear_context()

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hook functions, on the points of attached SAEs too.

        An attached SAE and a standing edit are permanent forward hooks: ``including_permanent``
        detaches them.
        """
        for point in self.hook_points():
            point.remove_hooks(dir=direction, including_permanent=including_permanent, level=level)
        if including_permanent and direction != "bwd" and level is None:
            self.reset_saes()
            self.reset_edits()

    @property
    def acts_to_saes(self) -> dict[str, Dictionary]:
        """The attached SAEs by hook name."""
        return {name: splice.sae for name, splice in self._splices.items()}

    def splice_hooks(self) -> dict[str, HookPoint]:
        """Return the hook points in attached SAEs, ``<hook name>.hook_sae_acts_post`` and so on."""
        hooks: dict[str, HookPoint] = {}
        for splice in getattr(self, "_splices", {}).values():
            hooks.update(splice.hooks)
        return hooks

    def _attach_sae(
        self, sae: Dictionary, use_error_term: bool | None, tokens: str | None, check_model: bool
    ) -> None:
        site = Site.of(self, sae, tokens=tokens, check_model=check_model)
        if use_error_term is None:
            use_error_term = bool(getattr(sae, "use_error_term", False))
        for name in self._splices_at(site.hook_name, site.hook_name_out):
            self._splices.pop(name).detach()
        splice = Splice(sae, site, use_error_term)
        splice.attach()
        self._splices[self._key(site)] = splice

    def _splices_at(self, hook_name: str, hook_name_out: str | None = None) -> list[str]:
        """Return the keys of the splices that read at a hook, by any of its names.

        Args:
            hook_name: Hook that is read.
            hook_name_out: Hook that is written; None takes any.
        """
        points = self.hook_dict
        reads, writes = points.get(hook_name), points.get(hook_name_out or "")
        return [
            key
            for key, splice in self._splices.items()
            if points[splice.site.hook_name] is reads
            and (hook_name_out is None or points[splice.site.hook_name_out] is writes)
        ]

    def _key(self, site: Site) -> str:
        """Return the name of a splice: the hook that it reads, and where another does, both."""
        if site.hook_name not in self._splices:
            return site.hook_name
        return f"{site.hook_name} -> {site.hook_name_out}"

    def _detach_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        names = [act_names] if isinstance(act_names, str) else act_names
        for name in list(self._splices) if names is None else names:
            keys = [name] if name in self._splices else self._splices_at(name)
            if not keys:
                attached = ", ".join(self._splices) or "none"
                raise ValueError(f"no SAE is attached at {name!r}; attached: {attached}")
            for key in keys:
                self._splices.pop(key).detach()

    def _restore(self, before: dict[str, Splice]) -> None:
        for name, splice in list(self._splices.items()):
            if before.get(name) is not splice:
                self._splices.pop(name).detach()
        for name, splice in before.items():
            if name not in self._splices:
                splice.attach()
                self._splices[name] = splice

    def _attach_edit(self, edit: Any, check_model: bool) -> None:
        before = self._forward_handles()
        self._standing_edits.enter_context(self.edit(edit, check_model=check_model))
        self._edits.append(edit)
        self._edit_handles |= self._forward_handles() - before

    def _detach_edits(self) -> None:
        self._standing_edits.close()
        self._edits.clear()
        self._edit_handles.clear()

    def _forward_handles(self) -> set[int]:
        return {id(handle) for point in self.hook_points() for handle in point.fwd_hooks}


class Splice:
    """One attached SAE: its hook function, its own hook points, and how to detach it."""

    def __init__(self, sae: Dictionary, site: Site, use_error_term: bool) -> None:
        self.sae, self.site, self.use_error_term = sae, site, use_error_term
        self.hooks: dict[str, HookPoint] = {}
        self._names_before: dict[str, str | None] = {}
        self._capture = site.capture()
        self.handles: list[tuple[HookPoint, LensHandle]] = []
        self._own = {"hook_sae_error": HookPoint(), "hook_sae_output": HookPoint()}

    def attach(self) -> None:
        """Add the hook functions and name the SAE's hook points after their place in the model."""
        points = self.site.model.hook_dict
        hook_in, hook_out = points[self.site.hook_name], points[self.site.hook_name_out]
        own = getattr(self.sae, "hook_dict", {})
        inner = {name: hook for name, hook in own.items() if name not in self._own}
        for name, hook in {**inner, **self._own}.items():
            full_name = f"{self.site.hook_name_out}.{name}"
            self._names_before[full_name] = hook.name
            self.hooks[full_name] = hook
            hook.name = full_name
        if self._capture.is_needed:
            self.handles.append((hook_in, permanent_hook(hook_in, self._capture.keep)))
        self.handles.append((hook_out, permanent_hook(hook_out, self._splice)))

    def detach(self) -> None:
        """Remove the hook functions; hooks that users added to the SAE's own points stay."""
        for hook_point, handle in self.handles:
            remove_hook(hook_point, handle)
        self.handles.clear()
        for full_name, hook in self.hooks.items():
            hook.name = self._names_before[full_name]
        self.hooks.clear()
        self._capture.forget()

    def _splice(self, activation: Tensor, hook: Any) -> Tensor:
        del hook
        flat = join_heads(self._capture.source(activation), int(self.sae.cfg.d_in))
        output = reconstruct(self.sae, flat)
        if self.use_error_term:
            with torch.no_grad(), silent_hooks(self.sae):
                clean = reconstruct(self.sae, flat).to(activation.dtype)
                error = join_heads(activation, d_out(self.sae)) - clean
                error = self._own["hook_sae_error"](error)
            output = output + error
        output = output.to(activation.dtype).reshape(activation.shape)
        mask = self.site.mask(activation)
        if mask is not None:
            output = torch.where(mask, output, activation)
        spliced: Tensor = self._own["hook_sae_output"](output)
        return spliced
