"""Activations by hook name over plain forward hooks on the native module.

The bridge is for people; this is for harvesting. The native forward runs as it is, with one
PyTorch hook per activation, and stops as soon as the last of them is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """Where the native module shows what a hook point shows."""

    path: str
    """Dotted path of the native submodule."""
    side: str
    """``"in"`` or ``"out"``: its first input or its output."""
    convert: Callable[[Tensor], Tensor] | None = None
    """What makes the hook point's tensor of the native one."""


class _AllHarvested(Exception):
    """Ends the forward pass once nothing more is wanted of it."""


class Harvester:
    """Collects the activations at some hooks, at close to the cost of the native forward.

    Example:
        >>> harvest = Harvester(model, ["blocks.5.hook_resid_post"])  # doctest: +SKIP
        >>> harvest(pixels)["blocks.5.hook_resid_post"].shape  # doctest: +SKIP
        torch.Size([8, 50, 768])
    """

    def __init__(self, model: Any, hook_names: Sequence[str]) -> None:
        """Find the native place of each hook.

        Args:
            model: A VisionBridge.
            hook_names: Any names of ``model.hook_dict`` but those of attention scores, pattern
                and per-head results, which the native forward does not form.

        Raises:
            UnknownHookError: the model has no such hook.
            ValueError: the activation is not to be had from the native forward, or no name is
                given.
        """
        if not hook_names:
            raise ValueError("name at least one hook to harvest")
        model.check_hook_names(hook_names)
        self.model = model
        self.sources = {name: native_source(model, name) for name in hook_names}

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Run the native forward as far as needed.

        Args:
            pixels: [batch, channels, height, width].

        Returns:
            The activation of each hook, as the bridge's cache has it, in the order of the names.
        """
        found: dict[str, Tensor] = {}
        with self._hooks(found), suppress(_AllHarvested):
            self.model.adapter.native_forward(self.model.native, pixels)
        # A position table is looked up once for the whole batch; the cache has it per image.
        return {
            name: found[name].expand(len(pixels), *found[name].shape[1:]) for name in self.sources
        }

    @contextmanager
    def _hooks(self, found: dict[str, Tensor]) -> Iterator[None]:
        handles = []
        try:
            for name, source in self.sources.items():
                module = self.model.native.get_submodule(source.path)
                handles.append(_watch(module, name, source, found, len(self.sources)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def native_source(model: Any, hook_name: str) -> Source:
    """The native place of a hook point.

    Raises:
        ValueError: the native forward does not form the activation.
    """
    hook_point = model.hook_dict[hook_name]
    sources: Mapping[str, Source] = model.adapter.harvest_sources(model)
    if hook_point.name not in sources:
        raise ValueError(
            f"{hook_name} cannot be harvested from the native forward of "
            f"{model.cfg.model_name}; model.run_with_cache(names_filter={hook_name!r}) computes it"
        )
    return sources[hook_point.name]


def component_sources(model: Any) -> dict[str, Source]:
    """Sources of what the bridge's components take in and give out, by canonical hook name."""
    sources: dict[str, Source] = {}
    for path, component in _components(model):
        for side in ("in", "out"):
            hook_point = getattr(component, f"hook_{side}")
            conversion = hook_point.hook_conversion
            convert = None if conversion is None else conversion.convert
            sources[hook_point.name] = Source(path, side, convert)
        if hasattr(component, "hook_normalized"):
            sources[component.hook_normalized.name] = Source(path, "in", _normaliser(component))
    return sources


def _components(model: Any) -> Iterator[tuple[str, Any]]:
    """The bridge's components with their paths in the native module.

    A component stands where the native module stood and holds it as ``_original_component``, so
    leaving that step out of its path in the bridged copy gives the path in the native module.
    """
    for path, module in model.original_model.named_modules():
        if hasattr(module, "original_component") and hasattr(module, "hook_in"):
            steps = [step for step in path.split(".") if step != "_original_component"]
            yield ".".join(steps), module


def _normaliser(component: Any) -> Callable[[Tensor], Tensor]:
    norm: nn.Module = component.original_component
    eps = float(getattr(norm, "eps", 1e-5))

    def normalise(x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)

    return normalise


def _watch(
    module: nn.Module, name: str, source: Source, found: dict[str, Tensor], wanted: int
) -> Any:
    def take(tensor: Tensor) -> None:
        found[name] = tensor if source.convert is None else source.convert(tensor)
        if len(found) == wanted:
            raise _AllHarvested

    if source.side == "in":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(after)
