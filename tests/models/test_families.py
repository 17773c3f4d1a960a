"""Every family of vision transformers under the bridge: the same guarantees for all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import vision_plugin as vp
from benchmarks import _family_checks as checks
from benchmarks import families
from benchmarks._family_cases import Case
from vision_plugin.models import UnsupportedModelError
from vision_plugin.models.site import class_token_alone, reads_class_token
from vision_plugin.steering import EditPass


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def bridged(label: str) -> tuple[Case, Any, torch.Tensor]:
    """A case of the sample with its bridge and images; None for the bridge of a refusal."""
    case = SAMPLE[label]
    try:
        model = vp.wrap(case.build(), name=case.name)
    except UnsupportedModelError:
        return case, None, torch.empty(0)
    dims = model.adapter.tower_dimensions
    generator = torch.Generator().manual_seed(1)
    size = case.image or dims.image_size
    return case, model, torch.randn(2, dims.n_channels, *size, generator=generator)


SAMPLE = {case.label: case for case in families.sample()}
REFUSED = {
    "timm: vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "open_clip: RN50": "ModifiedResNet",
    "open_clip: convnext_base": "ConvNeXt",
}
SUPPORTED = [label for label in SAMPLE if label not in REFUSED]


@pytest.fixture(params=SUPPORTED)
def family(request: pytest.FixtureRequest) -> tuple[Case, Any, torch.Tensor]:
    case, model, pixels = bridged(request.param)
    assert model is not None, f"{request.param} is refused"
    return case, model, pixels


def test_output_is_the_native_modules(family: tuple[Case, Any, torch.Tensor]) -> None:
    case, model, pixels = family
    assert checks.output_error(model, case.native, pixels) == 0.0


def test_reading_every_hook_changes_nothing(family: tuple[Case, Any, torch.Tensor]) -> None:
    case, model, pixels = family
    assert checks.hooked_error(model, case.native, pixels) <= case.tolerance


def test_output_is_exact_with_outliers(family: tuple[Case, Any, torch.Tensor]) -> None:
    case, model, pixels = family
    assert checks.outlier_error(model, case.native, pixels) == 0.0


def test_residual_stream_is_the_sum_of_its_parts(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    assert checks.residual_error(model, pixels) < 1e-6


def test_stops_and_starts_at_every_layer(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    assert checks.stretch_error(model, pixels) == 0.0


def test_patterns_sum_to_one_and_can_be_edited(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    assert checks.pattern_error(model, pixels) < 1e-5


def test_head_results_sum_to_the_attention_output(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    assert checks.head_error(model, pixels) < 1e-5


def test_every_canonical_name_fires(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    assert checks.silent_hooks(model, pixels) == []


def test_edits_reach_the_output(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    assert checks.edit_reaches_output(model, pixels) == []


def test_harvest_equals_the_cache(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    assert checks.harvest_error(model, pixels) == 0.0


def test_runs_in_bfloat16(family: tuple[Case, Any, torch.Tensor]) -> None:
    case, model, pixels = family
    assert checks.half_error(model, case.native, pixels) == 0.0


def test_gradient_reaches_the_first_block(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    assert checks.gradient_flows(model, pixels)


def test_tokens_are_those_of_the_residual_stream(family: tuple[Case, Any, torch.Tensor]) -> None:
    _, model, pixels = family
    _, cache = model.run_with_cache(pixels, names_filter="blocks.0.hook_resid_pre")
    layout = model.token_layout(tuple(pixels.shape[-2:]))
    assert cache["resid_pre", 0].shape[1] == layout.n_tokens
    patch = model.adapter.tower_dimensions.patch_size
    assert layout.grid == (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])


def test_patch_tokens_are_in_the_order_of_the_grid(
    family: tuple[Case, Any, torch.Tensor],
) -> None:
    _, model, pixels = family
    layout = model.token_layout(tuple(pixels.shape[-2:]))
    (rows, columns), patch = layout.grid, model.adapter.tower_dimensions.patch_size
    row, column = rows - 1, columns - 2
    changed = pixels.clone()
    changed[
        ..., row * patch[0] : (row + 1) * patch[0], column * patch[1] : (column + 1) * patch[1]
    ] += 1
    _, before = model.run_with_cache(pixels, names_filter="hook_embed")
    _, after = model.run_with_cache(changed, names_filter="hook_embed")
    moved = (before["hook_embed"] != after["hook_embed"]).any(-1)[0].nonzero().flatten()
    expected = layout.indices("patch")[row * columns + column]
    assert moved.tolist() == [int(expected)]


def test_wrap_leaves_the_module_alone(family: tuple[Case, Any, torch.Tensor]) -> None:
    case, _, pixels = family
    module = case.build()
    twin = copy.deepcopy(module)
    model = vp.wrap(module)
    model.run_with_cache(pixels)
    assert [type(m) for m in module.modules()] == [type(m) for m in twin.modules()]
    assert [n for n, _ in module.named_modules()] == [n for n, _ in twin.named_modules()]
    assert module.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in module.state_dict().items())
    owned = {id(p) for p in module.parameters()}
    assert all(id(p) in owned for p in model.native.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_an_sae_with_its_error_changes_nothing(family: tuple[Case, Any, torch.Tensor]) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    _, model, pixels = family
    sae = StandardSAE(StandardSAEConfig(d_in=model.cfg.d_model, d_sae=2 * model.cfg.d_model))
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    with torch.no_grad():
        clean = model(pixels)
        with_error = model.run_with_saes(pixels, saes=[sae], use_error_term=True)
        without = model.run_with_saes(pixels, saes=[sae], use_error_term=False)
    assert checks.difference(with_error, clean) < 1e-5
    assert checks.difference(without, clean) > 1e-5


COMPILED = ("transformers: DINOv3ViTModel", "timm: eva02_base_patch14_224", "open_clip: ViT-B-32")


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(COMPILED[0], marks=pytest.mark.slow),
        *(pytest.param(label, marks=pytest.mark.exhaustive) for label in COMPILED[1:]),
    ],
)
def test_the_plain_forward_compiles(label: str) -> None:
    case, model, pixels = bridged(label)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x), backend="eager")
    with torch.no_grad():
        assert checks.difference(compiled(pixels), case.native(model.native, pixels)) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize(("label", "part"), REFUSED.items())
def test_refusal_names_the_part(label: str, part: str) -> None:
    with pytest.raises(UnsupportedModelError, match=part) as refusal:
        vp.wrap(SAMPLE[label].build())
    assert "CONTRIBUTING.md" in str(refusal.value)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", families.everything(), ids=lambda case: case.label)
def test_every_listed_name_is_exact_or_refused_with_a_reason(case: Case) -> None:
    row = families.run(case)
    assert row.supported or row.reason


@torch.no_grad()
def test_a_short_last_block_gives_the_same_embedding(
    family: tuple[Case, Any, torch.Tensor],
) -> None:
    """Where only the class token is read, edited passes run the last block for it alone."""
    case, model, pixels = family
    if case.image not in (
        None,
        model.adapter.tower_dimensions.image_size,
    ):  # an edited pass begins at a stream of the model's own size
        return
    edit = vp.Edit.add("blocks.0.hook_mlp_out", {1: 3.0, 4: -2.0})
    run = EditPass(model, pixels)
    with model.edit(edit):
        whole = model.image_features(pixels, normalize=False)
    torch.testing.assert_close(run.embed(edit), whole, rtol=1e-3, atol=1e-4)
    last = run.stream(int(model.cfg.n_layers) - 1)
    if reads_class_token(model, last):
        before = model.image_features(pixels, normalize=False)
        with class_token_alone(model):
            short = model.image_features(last, normalize=False, start_at_layer=-1)
        torch.testing.assert_close(short, before, rtol=1e-3, atol=1e-4)
        # Nothing stays behind.
        assert torch.equal(model.image_features(pixels, normalize=False), before)
    elif case.label in SHORT:
        pytest.fail(f"{case.label} reads its class token alone, and all tokens were run")


SHORT = ("transformers: CLIPModel", "transformers: ViTModel", "transformers: Dinov2Model")
