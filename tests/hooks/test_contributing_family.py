"""The worked example of "add a model family": a tower the package does not know, from outside.

What stands between the two markers is what CONTRIBUTING.md shows.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vision_plugin as vp
from benchmarks import _family_checks as checks
from vision_plugin.models import UnsupportedModelError, _wrapping
from vision_plugin.models.readout import Readout

# --8<-- the family
from vision_plugin.hooks._adapter import Dimensions, Paths, VisionArchitectureAdapter  # isort: skip
from vision_plugin.hooks._components import VisionAttentionBridge  # isort: skip


class PebbleAttentionBridge(VisionAttentionBridge):
    """Pebble's attention returns a tensor, not transformers' pair."""

    def pack(self, output: Tensor) -> Tensor:
        return output


class PebbleAdapter(VisionArchitectureAdapter):
    """``PebbleTower``: its sizes, and where it keeps its parts."""

    attention = PebbleAttentionBridge

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        return Dimensions(
            d_model=module.width,
            n_heads=module.stones[0].look.heads,
            n_layers=len(module.stones),
            d_mlp=module.stones[0].think.grow.out_features,
            image_size=(module.side, module.side),
            patch_size=(module.patch, module.patch),
            n_cls=0,
        )

    def paths(self, module: nn.Module) -> Paths:
        return Paths(
            embed="start",
            blocks="stones",
            ln1="calm_one",
            attn="look",
            q="ask",
            k="offer",
            v="give",
            o="join",
            ln2="calm_two",
            mlp="think",
            mlp_in="grow",
            mlp_out="shrink",
            ln_final="finish",
        )

    def image_output(self, output: Tensor) -> Tensor:
        return output

    def pooled(self, output: Tensor) -> Tensor:
        return output.mean(dim=1)


# --8<-- the family


class Look(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask, self.offer, self.give, self.join = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.ask, self.offer, self.give)
        )
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.join(z.transpose(1, 2).flatten(2))


class Think(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.grow, self.shrink = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.shrink(torch.relu(self.grow(x)))


class Stone(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.calm_one, self.calm_two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look, self.think = Look(width, heads), Think(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.look(self.calm_one(x))
        return x + self.think(self.calm_two(x))


class Start(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, patch, patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.cut(pixels).flatten(2).transpose(1, 2)


class PebbleTower(nn.Module):
    """A vision transformer that no library knows."""

    def __init__(self, width: int = 24, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.width, self.side, self.patch = width, 32, 8
        self.start = Start(width, self.patch)
        self.stones = nn.ModuleList([Stone(width, heads) for _ in range(depth)])
        self.finish = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.start(pixel_values)
        for stone in self.stones:
            x = stone(x)
        return self.finish(x)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family's entry point, as an installed package would have it."""
    entry = EntryPoint("PebbleTower", f"{__name__}:PebbleAdapter", "vision_plugin.architectures")
    known = dict(_wrapping.adapters())
    monkeypatch.setattr(_wrapping, "adapters", lambda: {**known, "PebbleTower": entry})


@pytest.fixture
def tower() -> PebbleTower:
    torch.manual_seed(0)
    return PebbleTower().eval()


def native(module: nn.Module, pixels: Tensor) -> Tensor:
    return module(pixel_values=pixels)


def test_without_the_entry_point_the_error_shows_the_way(tower: PebbleTower) -> None:
    with pytest.raises(UnsupportedModelError, match=r"PebbleTower.*CONTRIBUTING\.md"):
        vp.wrap(tower)


@pytest.mark.usefixtures("registered")
def test_the_added_family_has_every_guarantee(tower: PebbleTower) -> None:
    model, pixels = vp.wrap(tower), torch.randn(2, 3, 32, 32)
    assert checks.output_error(model, native, pixels) == 0
    assert checks.hooked_error(model, native, pixels) == 0
    assert checks.outlier_error(model, native, pixels) == 0
    assert checks.residual_error(model, pixels) < 1e-6
    assert checks.stretch_error(model, pixels) == 0
    assert checks.pattern_error(model, pixels) < 1e-5
    assert checks.head_error(model, pixels) < 1e-5
    assert checks.silent_hooks(model, pixels) == []
    assert checks.edit_reaches_output(model, pixels) == []
    assert checks.harvest_error(model, pixels) == 0
    assert checks.gradient_flows(model, pixels)


@pytest.mark.usefixtures("registered")
def test_a_part_that_does_not_match_is_named(tower: PebbleTower) -> None:
    for stone in tower.stones:
        stone.ponder = stone.think
        del stone.think
    with pytest.raises(UnsupportedModelError, match=r"PebbleTower.*think.*CONTRIBUTING\.md"):
        vp.wrap(tower)


@pytest.mark.usefixtures("registered")
def test_what_it_reads_in_place_of_a_class_token_has_to_be_said(
    tower: PebbleTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pixels = vp.wrap(tower), torch.randn(2, 3, 32, 32)
    with pytest.raises(UnsupportedModelError, match=r"override readout\(\)"):
        model.decompose(pixels)

    def readout(self: object, model: Any) -> Readout:
        return Readout("all", model.ln_final.original_component)

    monkeypatch.setattr(type(model.adapter), "readout", readout)
    total = model.decompose(pixels).total()
    torch.testing.assert_close(total, model.image_features(pixels, normalize=False))
