"""What a pass through the bridge does beside the native forward: nothing, until a hook is set."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vision_plugin as vp


class Operations(TorchDispatchMode):
    """Counts the operations that a pass asks torch for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _operations(run: Any) -> Counter[str]:
    with torch.no_grad(), Operations() as found:
        run()
    return found.names


def _attention(found: Counter[str]) -> tuple[int, int]:
    """How many fused attentions and how many patterns were computed."""
    fused = sum(n for name, n in found.items() if "scaled_dot_product" in name)
    patterns = sum(n for name, n in found.items() if "softmax" in name)
    return fused, patterns


@pytest.fixture(scope="module")
def model(tiny_clip: str) -> Any:
    """A model loaded by name."""
    return vp.load_model(tiny_clip)


PIXELS = torch.zeros(2, 3, 32, 32)


def test_without_a_hook_the_bridge_asks_for_the_operations_of_the_native_forward(model):
    native = _operations(lambda: model.adapter.native_forward(model.native, PIXELS))
    bridge = _operations(lambda: model(PIXELS))
    # Views cost nothing; one more or fewer is no difference.
    more = {name: n for name, n in (bridge - native).items() if not _is_view(name)}
    assert more == {}
    assert _attention(bridge) == _attention(native) == (3, 0)


def _is_view(name: str) -> bool:
    return any(word in name for word in ("view", "expand", "slice", "transpose", "unsqueeze"))


def test_a_model_loaded_by_name_attends_with_sdpa(model):
    config = model.native.config
    assert config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("block", [0, 2])
def test_a_pattern_is_formed_only_where_somebody_looks(model, block):
    seen = []

    def look(pattern: torch.Tensor, hook: Any) -> None:
        seen.append(pattern.shape)

    hooks = [(f"blocks.{block}.attn.hook_pattern", look)]
    found = _operations(lambda: model.run_with_hooks(PIXELS, fwd_hooks=hooks))
    assert len(seen) == 1
    assert _attention(found)[1] == 1


def test_a_hook_on_the_stream_adds_no_operation(model):
    plain = _operations(lambda: model(PIXELS))
    hooks = [("blocks.1.hook_resid_post", lambda tensor, hook: None)]
    assert _operations(lambda: model.run_with_hooks(PIXELS, fwd_hooks=hooks)) == plain


def test_statistics_of_a_norm_are_there_where_somebody_looks(model):
    """A hook on the scale sees it, and another that edits it still changes the output."""
    name = "blocks.1.ln1.hook_scale"
    seen = []

    def double(scale: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(scale)
        return 2 * scale

    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with pytest.warns(UserWarning, match="hook_scale"):
            edited = model.run_with_hooks(pixels, fwd_hooks=[(name, double)])
        _, cache = model.run_with_cache(pixels, names_filter="blocks.1.hook_resid_pre")
    x = cache["blocks.1.hook_resid_pre"].double()
    eps = model.native.config.vision_config.layer_norm_eps
    expected = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not torch.equal(edited, model(pixels))
