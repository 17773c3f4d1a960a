"""Read activations by hook name with plain forward hooks on the native module.

This is the fast way for many images; the bridge is the convenient one. The native forward runs
unchanged with one PyTorch hook per activation, and stops after the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_plugin.models._modes import in_eval_mode


@dataclass(frozen=True)
class Source:
    """Place in the native module where a hook point's tensor appears.

    Examples:
        >>> sources = vp.models.component_sources(model)
        >>> sources["blocks.2.hook_out"].side
        'out'
    """

    path: str
    """Dotted path of the native submodule."""
    side: str
    """``"in"`` for the submodule's first input, ``"out"`` for its output."""
    convert: Callable[[Tensor], Tensor] | None = None
    """Turns the native tensor into the hook point's tensor; None keeps it."""


class _AllHarvested(Exception):
    """Ends the forward pass once every activation has been read."""


class Harvester:
    """Collects the activations at some hooks, at about the cost of the native forward.

    Examples:
        >>> harvest = vp.models.Harvester(model, ["blocks.2.hook_resid_post"])
        >>> harvest(pixels)["blocks.2.hook_resid_post"].shape
        torch.Size([8, 65, 128])
    """

    def __init__(self, model: Any, hook_names: Sequence[str]) -> None:
        """Find the native place of each hook.

        Args:
            model: A VisionBridge.
            hook_names: Names of ``model.hook_dict``, except attention scores, attention pattern
                and per-head results, which the native forward does not compute.

        Raises:
            UnknownHookError: the model has no such hook.
            ValueError: there is no name, or the native forward does not compute the activation.
        """
        if not hook_names:
            raise ValueError("name at least one hook to harvest")
        model.check_hook_names(hook_names)
        self.model = model
        self.sources = {name: native_source(model, name) for name in hook_names}

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Run the native forward up to the last hook.

        Args:
            pixels: [batch, channels, height, width].

        Returns:
            The activation of each hook, in the order of the names, as the bridge's cache has it.

        Raises:
            ValueError: the pixels are not a batch.
        """
        self.model.check_pixels(pixels)
        found: dict[str, Tensor] = {}
        alone, hooks = self.model.alone(), self._hooks(found)
        with alone, in_eval_mode(self.model), hooks, suppress(_AllHarvested):
            self.model.adapter.native_forward(self.model.native, pixels)
        # A position table is read once for the whole batch; the cache has one row per image.
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
    """Return the place of a hook point's tensor in the native module.

    Raises:
        ValueError: the native forward does not compute the activation.
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
    """Return sources for the inputs and outputs of the bridge's components, by hook name.

    Args:
        model: A VisionBridge.

    Examples:
        >>> sources = vp.models.component_sources(model)
        >>> sources["blocks.2.hook_out"].path
        'vision_model.encoder.layers.2'
    """
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
    """Yield the bridge's components with their paths in the native module.

    A component replaces a native submodule and holds it as ``_original_component``. Without that
    step, a path in the bridged copy is the path in the native module.
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
