"""TransformerLens's bridge of a language model inside a vision-language model."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
    PositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.sources import build_bridge_from_module

from vision_plugin.models._errors import UnsupportedModelError

_FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in")


def language_bridge(
    native: nn.Module, tower: nn.Module, path: str, *, architecture: str, name: str
) -> TransformerBridge:
    """Return TransformerLens's bridge over a copy of a module's structure with another tower.

    The copy shares the native module's weights; the native module stays untouched.

    Args:
        native: The vision-language model.
        tower: What takes the place of its vision tower.
        path: Path of the vision tower.
        architecture: Name of TransformerLens's adapter.
        name: Name of the model.

    Raises:
        UnsupportedModelError: TransformerLens has no adapter, or its adapter does not fit.
    """
    memo: dict[int, Any] = {id(t): t for t in chain(native.parameters(), native.buffers())}
    memo[id(native.get_submodule(path))] = tower
    structure = copy.deepcopy(native, memo)

    def without_tower(adapter: Any) -> None:
        mapping = adapter.component_mapping
        inside = (path, f"{path}.")
        for part in [
            key for key, bridge in mapping.items() if f"{bridge.name}.".startswith(inside)
        ]:
            del mapping[part]
        attention: Any = mapping["blocks"].submodules.get("attn")
        if isinstance(attention, PositionEmbeddingsAttentionBridge):
            replacement: Any = _native_first(type(attention))
            attention.__class__ = replacement

    try:
        bridge = build_bridge_from_module(
            structure,
            architecture,
            hf_config=structure.config,
            model_name=name,
            post_adapter_hook=without_tower,
        )
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{name}: TransformerLens's adapter for {architecture} does not fit its language model "
            f"({error})"
        ) from error
    _keep_attention(native, structure)
    return bridge


def _keep_attention(native: nn.Module, structure: nn.Module) -> None:
    """Give the copy the kernels of the native module, where the adapter chose other ones."""
    config: Any = structure.config
    for part, own in [(config, native.config), *_parts(config, native.config)]:
        part._attn_implementation = own._attn_implementation


def _parts(config: Any, own: Any) -> list[tuple[Any, Any]]:
    names = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    return [(getattr(config, name), getattr(own, name)) for name in names]


class NativeFirst:
    """Attention of a language model that the native module computes, unless a hook needs more.

    TransformerLens computes this attention step by step, which differs from the native kernel in
    the last bits. Here it does so only where a hook on a step (rotated queries, scores, pattern,
    a head's result) is live.
    """

    config: Any
    original_component: Any
    hook_in: HookPoint
    hook_out: HookPoint
    _modules: dict[str, nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native attention between ``hook_in`` and ``hook_out``, or every step."""
        if self._needs_steps():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        output = self.original_component(self.hook_in(hidden), *args[1:], **kwargs)
        return (self.hook_out(output[0]), *output[1:])

    def _needs_steps(self) -> bool:
        if any(getattr(self.config, flag, False) for flag in _FLAGS):
            return True
        between = (
            part
            for name, part in self._modules.items()
            if isinstance(part, HookPoint) and name not in ("hook_in", "hook_out")
        )
        return any(hook.fwd_hooks or hook.bwd_hooks for hook in between)


_MADE: dict[type[AttentionBridge], type[AttentionBridge]] = {}


def _native_first(attention: type[AttentionBridge]) -> type[AttentionBridge]:
    """Return a class of attention that prefers the native module."""
    if attention not in _MADE:
        _MADE[attention] = type(f"Native{attention.__name__}", (NativeFirst, attention), {})
    return _MADE[attention]
