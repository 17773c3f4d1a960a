"""Sparse autoencoders spliced into a bridge, under HookedSAETransformer's names.

An attached SAE is a permanent hook function on the existing hook point, so no hook point is
replaced, every alias keeps working, and taking the SAE off leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint, LensHandle

from vision_plugin.models._fit import check_fit
from vision_plugin.models._tokens import TokenLayout, TokenSelection

SAE = Any
"""A ``sae_lens.SAE``; hooks, cfg, encode and decode are what is used of it."""


class Splicing:
    """The part of a bridge that attaches SAEs and steers; mixed into VisionBridge."""

    hook_dict: Any
    cfg: Any
    check_hook_names: Callable[[Sequence[object]], None]
    token_layout: Callable[..., TokenLayout]
    run_with_cache: Callable[..., Any]
    run_with_hooks: Callable[..., Any]

    def _setup_splicing(self) -> None:
        self._splices: dict[str, Splice] = {}

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """The attached SAEs by hook name."""
        return {name: splice.sae for name, splice in self._splices.items()}

    def splice_hooks(self) -> dict[str, HookPoint]:
        """Hook points inside the attached SAEs, ``<hook name>.hook_sae_acts_post`` and so on."""
        hooks: dict[str, HookPoint] = {}
        for splice in getattr(self, "_splices", {}).values():
            hooks.update(splice.hooks)
        return hooks

    def add_sae(
        self,
        sae: SAE,
        use_error_term: bool | None = None,
        *,
        tokens: str | None = None,
        check_model: bool = True,
    ) -> None:
        """Attach an SAE, or a transcoder, until :meth:`reset_saes`.

        The stream at the SAE's hook becomes its reconstruction, plus the reconstruction's error
        where the error term is on. An SAE already at that hook is replaced.

        Args:
            sae: Its metadata names the hook (``hook_name``, for a transcoder ``hook_name_out``).
            use_error_term: Add the error back; None follows the SAE's own setting.
            tokens: Which tokens go through the SAE; None follows what it was trained on.
            check_model: Refuse an SAE that was trained on another model.

        Raises:
            UnknownHookError: the model has no such hook.
            ValueError: width, model or token kind do not fit; both sides are named.
        """
        hook_in, hook_out = _hook_names(sae)
        self.check_hook_names([hook_in, hook_out])
        check_fit(self, sae, check_model=check_model)
        selection = TokenSelection.parse(tokens or trained_tokens(sae))
        if use_error_term is None:
            use_error_term = bool(sae.use_error_term)
        splice = Splice(sae, hook_out, use_error_term, selection, self.token_layout)
        if hook_in in self._splices:
            self._splices.pop(hook_in).detach()
        hooks = self.hook_dict
        splice.attach(hooks[hook_in], hooks[hook_out])
        self._splices[hook_in] = splice

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take off the SAEs at these hooks, or all of them.

        Raises:
            ValueError: no SAE is attached at a name given.
        """
        names = [act_names] if isinstance(act_names, str) else act_names
        for name in list(self._splices) if names is None else names:
            if name not in self._splices:
                attached = ", ".join(self._splices) or "none"
                raise ValueError(f"no SAE is attached at {name!r}; attached: {attached}")
            self._splices.pop(name).detach()

    @contextmanager
    def saes(
        self,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        *,
        tokens: str | None = None,
    ) -> Iterator[Any]:
        """SAEs for the length of a ``with`` block; what was attached before comes back after it."""
        before = dict(self._splices)
        try:
            for sae in saes if isinstance(saes, (list, tuple)) else [saes]:
                self.add_sae(sae, use_error_term=use_error_term, tokens=tokens)
            yield self
        finally:
            if reset_saes_end:
                self._restore(before)

    def _restore(self, before: dict[str, Splice]) -> None:
        for name, splice in list(self._splices.items()):
            if before.get(name) is not splice:
                self._splices.pop(name).detach()
        for name, splice in before.items():
            if name not in self._splices:
                hooks = self.hook_dict
                splice.attach(hooks[name], hooks[splice.hook_name])
                self._splices[name] = splice

    def run_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        tokens: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The forward pass with SAEs attached for it."""
        with self.saes(saes, reset_saes_end, use_error_term, tokens=tokens):
            return self(*args, **kwargs)  # type: ignore[operator]

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        tokens: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """``run_with_cache`` with SAEs attached for it; the cache holds their latents too."""
        with self.saes(saes, reset_saes_end, use_error_term, tokens=tokens):
            return self.run_with_cache(*args, **kwargs)

    def run_with_hooks_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        tokens: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """``run_with_hooks`` with SAEs attached for it, whose latents can be hooked by name."""
        with self.saes(saes, reset_saes_end, use_error_term, tokens=tokens):
            return self.run_with_hooks(*args, **kwargs)

    def steer(
        self, sae: SAE, latents: Mapping[int, float], *, tokens: str = "all"
    ) -> AbstractContextManager[None]:
        """Clamp latents within a ``with`` block; see :func:`vision_plugin.steering.steer`."""
        from vision_plugin.steering import steer

        return steer(self, sae, latents, tokens=tokens)


class Splice:
    """One attached SAE: its hook function, its own hook points, and how to take it off."""

    def __init__(
        self,
        sae: SAE,
        hook_name: str,
        use_error_term: bool,
        selection: TokenSelection,
        token_layout: Callable[[], TokenLayout],
    ) -> None:
        self.sae = sae
        self.hook_name = hook_name
        self.use_error_term = use_error_term
        self.selection = selection
        self.token_layout = token_layout
        self.hooks: dict[str, HookPoint] = {}
        self._names_before: dict[str, str | None] = {}
        self._captured: Tensor | None = None
        self._handles: list[tuple[HookPoint, LensHandle]] = []
        self._own = {"hook_sae_error": HookPoint(), "hook_sae_output": HookPoint()}

    def attach(self, hook_in: HookPoint, hook_out: HookPoint) -> None:
        """Hang the hook functions up and name the SAE's hook points after their place."""
        inner = {name: hook for name, hook in self.sae.hook_dict.items() if name not in self._own}
        for name, hook in {**inner, **self._own}.items():
            full_name = f"{self.hook_name}.{name}"
            self._names_before[full_name] = hook.name
            self.hooks[full_name] = hook
            hook.name = full_name
        if hook_in is not hook_out:
            self._handles.append((hook_in, permanent_hook(hook_in, self._capture)))
        self._handles.append((hook_out, permanent_hook(hook_out, self._splice)))

    def detach(self) -> None:
        """Take the hook functions down; hooks of users on the SAE's own points stay theirs."""
        for hook_point, handle in self._handles:
            remove_hook(hook_point, handle)
        self._handles.clear()
        for full_name, hook in self.hooks.items():
            hook.name = self._names_before[full_name]
        self.hooks.clear()
        self._captured = None

    def _capture(self, activation: Tensor, hook: Any) -> None:
        del hook
        self._captured = activation

    def _splice(self, activation: Tensor, hook: Any) -> Tensor:
        del hook
        source = activation if self._captured is None else self._captured
        self._captured = None
        flat = _flatten_heads(source, self.sae)
        output = run(self.sae, flat)
        if self.use_error_term:
            with torch.no_grad():
                clean = run(self.sae, flat, hooks=False)
                error = _flatten_heads(activation, self.sae, out=True) - clean.to(activation.dtype)
                error = self._own["hook_sae_error"](error)
            output = output + error
        output = output.to(activation.dtype).reshape(activation.shape)
        mask = token_mask(self.selection, self.token_layout, activation)
        if mask is not None:
            output = torch.where(mask, output, activation)
        spliced: Tensor = self._own["hook_sae_output"](output)
        return spliced


def run(sae: SAE, x: Tensor, *, hooks: bool = True) -> Tensor:
    """Reconstruction of an SAE or (skip) transcoder; ``hooks=False`` fires none of its hooks."""
    if not hooks:
        with silent_hooks(sae):
            return run(sae, x)
    from vision_plugin.sae._sparse_inference import add_skip, decode_of_encode

    output = decode_of_encode(sae, x)
    if output is None:
        output = sae.decode(sae.encode(x))
    return add_skip(sae, x, output)


@contextmanager
def silent_hooks(sae: SAE) -> Iterator[None]:
    """The SAE with its hook points passing everything through."""
    hooks = dict(sae.hook_dict)
    try:
        for name in hooks:
            setattr(sae, name, nn.Identity())
        yield
    finally:
        for name, hook in hooks.items():
            setattr(sae, name, hook)


@contextmanager
def heads_joined(sae: SAE) -> Iterator[None]:
    """The SAE taking all heads of ``hook_z`` as one vector, ``[..., d_in]``.

    SAELens has SAEs that take ``[..., n_heads, d_head]`` there (``reshape_activations="hook_z"``).
    """
    if not getattr(sae, "hook_z_reshaping_mode", False):
        yield
        return
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        sae.turn_on_forward_pass_hook_z_reshaping()


def permanent_hook(hook_point: HookPoint, function: Callable[..., Any]) -> LensHandle:
    """Add a hook that survives ``reset_hooks`` and return the handle that removes just it."""
    hook_point.add_hook(function, is_permanent=True)
    return hook_point.fwd_hooks[-1]


def remove_hook(hook_point: HookPoint, handle: LensHandle) -> None:
    """Remove one hook, also where something else has cleared the hook point before."""
    handle.hook.remove()
    if handle in hook_point.fwd_hooks:
        hook_point.fwd_hooks.remove(handle)


def trained_tokens(sae: SAE) -> str:
    """The kind of token the SAE's metadata says it was trained on; ``"all"`` where it is silent."""
    tokens = sae.cfg.metadata.get("tokens") or "all"
    return "all" if str(tokens).startswith("random:") else str(tokens)


def token_mask(
    selection: TokenSelection, token_layout: Callable[[], TokenLayout], activation: Tensor
) -> Tensor | None:
    """[batch, tokens, 1...] of True where the tokens are selected; None for all of them."""
    if selection == TokenSelection("all") or activation.ndim < 3:
        return None
    layout = token_layout()
    if activation.shape[1] != layout.n_tokens:
        raise ValueError(
            f"tokens={selection.kind!r} needs the model's {layout.n_tokens} tokens in the second "
            f"dimension, but this hook gives {list(activation.shape)}"
        )
    mask = selection.mask(layout, activation.shape[0]).to(activation.device)
    return mask.reshape(*mask.shape, *[1] * (activation.ndim - 2))


def _hook_names(sae: SAE) -> tuple[str, str]:
    metadata = sae.cfg.metadata
    hook_in = metadata.get("hook_name")
    if not hook_in:
        raise ValueError(
            "this SAE does not say where it belongs: set sae.cfg.metadata.hook_name, for example "
            "'blocks.10.hook_resid_post'"
        )
    return str(hook_in), str(metadata.get("hook_name_out") or hook_in)


def _flatten_heads(x: Tensor, sae: SAE, *, out: bool = False) -> Tensor:
    """[batch, tokens, n_heads, d_head] to [batch, tokens, d_in] for an SAE over all heads."""
    width = (getattr(sae.cfg, "d_out", None) if out else None) or sae.cfg.d_in
    return x.flatten(-2) if x.ndim == 4 and x.shape[-1] != width else x
