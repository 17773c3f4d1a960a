"""Edits: every kind against a plain hook written here, nesting, gradients, and edits on disk."""

from __future__ import annotations

import copy
import json
import pickle
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from sae_lens import StandardSAE, Transcoder, TranscoderConfig
from torch import Tensor

import vision_plugin as vp
from tests._clip import RESID, make_sae, model, pixels
from vision_plugin import Edit
from vision_plugin.metrics import random_dictionary
from vision_plugin.steering import Directions, EditPass, EffectPass, Where, edit_effect

__all__ = ["model", "pixels"]
HOOK = RESID
Z = "blocks.1.attn.hook_z"
MLP = "blocks.2.mlp.hook_post"


@pytest.fixture(scope="module")
def sae() -> StandardSAE:
    return make_sae()


def vectors(n: int, seed: int = 2) -> Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def f(sae: StandardSAE, x: Tensor, latent: int) -> Tensor:
    return sae.encode(x)[..., latent, None]


def out_of(x: Tensor, rows: Tensor) -> Tensor:
    """The span of some rows projected out, by an orthonormal basis."""
    q = torch.linalg.qr(rows.T).Q
    return x - x @ q @ q.T


S = make_sae()
D = vectors(3)
CASES = {
    "clamp a latent": (Edit.clamp(S, {5: 7.0}), lambda x: x + (7 - f(S, x, 5)) * S.W_dec[5]),
    "add to a latent": (Edit.add(S, {5: 2.0}), lambda x: x + 2 * S.W_dec[5]),
    "scale a latent": (Edit.scale(S, {5: -3.0}), lambda x: x - 4 * f(S, x, 5) * S.W_dec[5]),
    "suppress latents": (
        Edit.suppress(S, [5, 9]),
        lambda x: x - f(S, x, 5) * S.W_dec[5] - f(S, x, 9) * S.W_dec[9],
    ),
    "suppress to means": (
        Edit.suppress(S, [5, 9], to=torch.arange(48.0)),
        lambda x: x + (5 - f(S, x, 5)) * S.W_dec[5] + (9 - f(S, x, 9)) * S.W_dec[9],
    ),
    "project latents out": (Edit.project(S, [5, 9]), lambda x: out_of(x, S.W_dec[[5, 9]])),
    "in units of the maximum": (
        Edit.clamp(S, {5: 2.0}, maxima={5: 4.0}),
        lambda x: x + (8 - f(S, x, 5)) * S.W_dec[5],
    ),
    "only where it is active": (
        Edit.clamp(S, {5: 7.0}, above=0.2),
        lambda x: torch.where(f(S, x, 5) > 0.2, x + (7 - f(S, x, 5)) * S.W_dec[5], x),
    ),
    "only on tokens where another latent fires": (
        Edit.clamp(S, {5: 7.0}, where=Where({0: 2.0, 15: 0.5})),
        lambda x: torch.where(
            (f(S, x, 0) > 2.0) | (f(S, x, 15) > 0.5), x + (7 - f(S, x, 5)) * S.W_dec[5], x
        ),
    ),
    "only on tokens where no such latent fires": (
        Edit.add(S, {5: 2.0}, where=Where({0: 2.0}, outside=True)),
        lambda x: torch.where(f(S, x, 0) > 2.0, x, x + 2 * S.W_dec[5]),
    ),
    "without the error": (
        Edit.clamp(S, {5: 7.0}, include_error=False),
        lambda x: S.decode(S.encode(x)) + (7 - f(S, x, 5)) * S.W_dec[5],
    ),
    "norm kept": (
        Edit.add(S, {5: 9.0}, keep_norm=True),
        lambda x: (
            torch.nn.functional.normalize(x + 9 * S.W_dec[5], dim=-1) * x.norm(dim=-1, keepdim=True)
        ),
    ),
    "clamp a neuron": (
        Edit.clamp(HOOK, {4: 9.0}),
        lambda x: torch.cat([x[..., :4], torch.full_like(x[..., :1], 9), x[..., 5:]], -1),
    ),
    "add to a neuron": (
        Edit.add(HOOK, {4: 9.0}),
        lambda x: x + 9 * torch.nn.functional.one_hot(torch.tensor(4), 32),
    ),
    "add a direction": (
        Edit.add(Directions(HOOK, D[0]), {0: -2.0}),
        lambda x: x - 2 * D[0],
    ),
    "clamp a direction": (
        Edit.clamp(Directions(HOOK, D[:1]), {0: 3.0}),
        lambda x: x + (3 - x @ D[0] / D[0].dot(D[0]))[..., None] * D[0],
    ),
    "project a subspace out": (Edit.project(Directions(HOOK, D)), lambda x: out_of(x, D)),
    "project onto a centre": (
        Edit.project(Directions(HOOK, D), centre=vectors(1, 5)[0]),
        lambda x: out_of(x - vectors(1, 5)[0], D) + vectors(1, 5)[0],
    ),
    "readers of their own": (
        Edit.suppress(Directions(HOOK, D[:1], readers=D[1:2])),
        lambda x: x - (x @ D[1])[..., None] * D[0],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["all", "cls", "patch"])
@pytest.mark.parametrize("case", CASES)
def test_an_edit_equals_a_plain_hook(model, pixels, case: str, tokens: str) -> None:
    edit, formula = CASES[case]
    mask = model.token_layout().mask(tokens)[None, :, None]

    def hook_function(x: Tensor, hook: object) -> Tensor:
        return torch.where(mask, formula(x), x)

    expected = model.run_with_hooks(pixels, fwd_hooks=[(HOOK, hook_function)])
    with model.edit(edit.with_tokens(tokens)):
        got = model(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert (model(pixels) - got).abs().max() > 1e-4
    torch.testing.assert_close(
        EditPass(model, pixels, batch_size=2).embed(edit.with_tokens(tokens)),
        expected,
        rtol=1e-4,
        atol=2e-5,
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_plain_hook(model, pixels, case: str) -> None:
    edit, formula = CASES[case]
    grads = []
    for attached in (
        lambda: model.hooks(fwd_hooks=[(HOOK, lambda x, hook: formula(x))]),
        lambda: model.edit(edit.with_tokens("all")),
    ):
        leaf = pixels.clone().requires_grad_()
        with attached():
            model(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(
        grads[1], grads[0], rtol=1e-3, atol=1e-5 * float(grads[0].abs().max())
    )


@torch.no_grad()
def test_own_values_are_the_identity(model, pixels, sae) -> None:
    before = model(pixels[:1])
    own = sae.encode(model(pixels[:1], stop_at_layer=2)[0, 0])
    values = dict(enumerate(own.tolist()))
    unchanged = [
        Edit.clamp(sae, values, tokens="cls"),
        Edit.scale(sae, dict.fromkeys(range(48), 1.0)),
        Edit.add(sae, dict.fromkeys(range(48), 0.0), keep_norm=True),
        Edit.scale(HOOK, dict.fromkeys(range(32), 1.0)),
        Edit.add(Directions(HOOK, vectors(4)), dict.fromkeys(range(4), 0.0)),
        Edit(),
    ]
    for edit in unchanged:
        with model.edit(edit):
            torch.testing.assert_close(model(pixels[:1]), before, rtol=0, atol=1e-6)


@torch.no_grad()
def test_edits_at_several_layers_follow_each_other(model, pixels, sae) -> None:
    edit = (
        Edit.clamp("blocks.0.hook_mlp_out", {3: 2.0}, tokens="cls")
        + Edit.clamp(sae, {5: 7.0})
        + Edit.scale(MLP, {11: 4.0}, tokens="patch")
        + Edit.add(sae, {9: 3.0}, tokens="all")
    )
    patch = model.token_layout().mask("patch")

    def scale(x: Tensor, hook: object) -> Tensor:
        new = x.clone()
        new[..., 11] = torch.where(patch, x[..., 11] * 4, x[..., 11])
        return new

    def clamp_neuron(x: Tensor, hook: object) -> Tensor:
        new = x.clone()
        new[:, 0, 3] = 2
        return new

    hooks = [
        ("blocks.0.hook_mlp_out", clamp_neuron),
        (HOOK, lambda x, hook: x + (7 - f(sae, x, 5)) * sae.W_dec[5] + 3 * sae.W_dec[9]),
        (MLP, scale),
    ]
    expected = model.run_with_hooks(pixels, fwd_hooks=hooks)
    with model.edit(edit):
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(EditPass(model, pixels).embed(edit), expected, rtol=1e-4, atol=2e-5)
    assert edit.hook_names == ("blocks.0.hook_mlp_out", HOOK, MLP)


@torch.no_grad()
def test_nested_edits_unwind_in_any_order_and_after_errors(model, pixels, sae) -> None:
    clean = model(pixels)
    one, two = Edit.clamp(sae, {5: 7.0}), Edit.clamp(sae, {9: 4.0}, tokens="cls")
    first, second = model.edit(one), model.edit(two)
    with model.edit(two):
        only_two = model(pixels)
    first.__enter__()
    second.__enter__()
    with model.edit(one + two):
        pass
    both = model(pixels)
    first.__exit__(None, None, None)  # the outer one goes first
    torch.testing.assert_close(model(pixels), only_two, rtol=0, atol=0)
    second.__exit__(None, None, None)
    with model.edit(one + two):
        torch.testing.assert_close(model(pixels), both, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="broken"), model.edit(one), model.edit(two):
        raise RuntimeError("broken")
    with pytest.raises(ValueError, match="out of range"), ExitStack() as stack:
        stack.enter_context(model.edit(one))
        stack.enter_context(model.edit(two + Edit.clamp(HOOK, {99: 0.0})))
        model(pixels)
    assert torch.equal(model(pixels), clean)
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


@torch.no_grad()
def test_heads_are_joined_and_can_be_taken_away(model, pixels) -> None:
    head = Edit.suppress(Z, range(16, 24), tokens="cls")  # the third head of 8 dimensions

    def without(z: Tensor, hook: object) -> Tensor:
        z = z.clone().view(len(z), -1, 4, 8)
        z[:, 0, 2] = 0
        return z.flatten(2) if hook_is_flat else z

    _, cache = model.run_with_cache(pixels)
    hook_is_flat = cache[Z].ndim == 3
    expected = model.run_with_hooks(pixels, fwd_hooks=[(Z, without)])
    with model.edit(head):
        torch.testing.assert_close(model(pixels), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_mask_of_patches_changes_those_patches_alone(model, pixels, sae) -> None:
    before = model(pixels, stop_at_layer=2)
    with model.edit(Edit.clamp(sae, {5: 7.0}, tokens="patch", patches=[0, 7])):
        after = model(pixels, stop_at_layer=2)
    moved = (after - before).abs().amax(-1) > 1e-5
    assert moved[0].nonzero().flatten().tolist() == [1, 8]  # after one class token
    with pytest.raises(ValueError, match="patch 16 is out of range: there are 16, from 0"):
        model.edit(Edit.clamp(sae, {5: 7.0}, patches=[16])).__enter__()


@torch.no_grad()
def test_a_transcoder_and_an_sae_that_rescales_are_edited(model, pixels) -> None:
    torch.manual_seed(0)
    transcoder = Transcoder(
        TranscoderConfig(d_in=32, d_out=32, d_sae=48, apply_b_dec_to_input=False)
    )
    for weights in (transcoder.W_dec, transcoder.W_enc, transcoder.b_enc):
        torch.nn.init.normal_(weights)
    transcoder.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    transcoder.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    read: list[Tensor] = []
    hooks = [
        ("blocks.1.hook_resid_pre", lambda x, hook: read.append(x)),
        (
            "blocks.1.hook_mlp_out",
            lambda x, hook: x - 3 * f(transcoder, read[-1], 5) * transcoder.W_dec[5],
        ),
    ]
    expected = model.run_with_hooks(pixels, fwd_hooks=hooks)
    edit = Edit.scale(transcoder, {5: -2.0})
    with model.edit(edit):
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(EditPass(model, pixels).embed(edit), expected, rtol=1e-4, atol=2e-5)

    rescaling = make_sae(normalize_activations="layer_norm")
    x = model(pixels, stop_at_layer=2)
    std = (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
    with model.edit(Edit.clamp(rescaling, {5: 7.0}, tokens="all")):
        torch.testing.assert_close(
            model(pixels, stop_at_layer=2),
            x + std * (7 - f(rescaling, x, 5)) * rescaling.W_dec[5],
            rtol=1e-3,
            atol=1e-4,
        )


def test_an_edit_says_what_it_does(sae) -> None:
    assert str(Edit.clamp(sae, {5: 2.0}, maxima={5: 4.0}, above=0.5, tokens="cls")) == (
        "clamp latent 5 to 8 (2 of its maximum) (latents of a StandardSAE of 48 at "
        f"{HOOK}, tokens cls, where above 0.5)"
    )
    assert "and 34 more" in str(Edit.suppress(sae, range(40)))
    assert repr(Edit()) == "Edit(no change)"
    assert len(Edit.add(HOOK, {1: 1.0}) + Edit.project(Directions(HOOK, vectors(2)))) == 2


def test_an_edit_takes_the_tokens_that_the_sae_was_trained_on() -> None:
    sae = make_sae()
    sae.cfg.metadata.tokens = "patch"
    for edit in (Edit.clamp(sae, {5: 1.0}), Edit.project(sae, [5])):
        assert edit.changes[0].tokens == "patch"


@torch.no_grad()
def test_an_edit_comes_back_from_disk(model, pixels, tmp_path: Path) -> None:
    sae = make_sae()
    sae.save_model(str(tmp_path / "sae"))
    edit = (
        Edit.clamp(sae, {5: 2.0, 7: 1.5}, maxima={5: 4.0, 7: 0.3}, above=0.1)
        + Edit.suppress(HOOK, [4], tokens="patch", patches=[1, 2], keep_norm=True)
        + Edit.project(Directions(HOOK, vectors(2)), centre=vectors(1)[0])
        + Edit.scale(sae, {9: 0.5}, include_error=False, tokens="cls")
    )
    with model.edit(edit):
        expected = model(pixels)
    file = tmp_path / "edit.json"
    edit.save(file, sae="sae")
    for loaded in (
        Edit.load(file),
        Edit.load(file, sae=sae),
        Edit.load(file, sae=tmp_path / "sae"),
    ):
        assert str(loaded) == str(edit)
        assert loaded.to_dict(sae="sae") == json.loads(file.read_text())
        with model.edit(loaded):
            torch.testing.assert_close(model(pixels), expected, rtol=0, atol=1e-6)
    edit.save(file)
    with pytest.raises(ValueError, match="does not say where its SAE lies: give the SAE with sae="):
        Edit.load(file)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(FileExistsError, match="left alone"):
        edit.save(tmp_path / "mine.json")


def test_latents_of_another_sae_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "edit.json"
    Edit.clamp(make_sae(), {5: 2.0}).save(file)
    with pytest.raises(ValueError, match=r"48 latents at blocks\.1.* is another one"):
        Edit.load(file, sae=make_sae(seed=1))
    shuffled = make_sae()
    with torch.no_grad():  # the same latents in another order have the same norms
        shuffled.W_dec.copy_(shuffled.W_dec.flip(0))
        shuffled.W_enc.copy_(shuffled.W_enc.flip(1))
    with pytest.raises(ValueError, match="is another one"):
        Edit.load(file, sae=shuffled)
    assert len(Edit.load(file, sae=[make_sae(seed=1), make_sae()])) == 1


def test_places_are_saved_and_a_bad_one_is_refused(tmp_path) -> None:
    sae, file = make_sae(), tmp_path / "edit.json"
    edit = Edit.add(sae, {5: 2.0}, where=Where({9: 0.25, 1: 0.5}, outside=True))
    edit.save(file)
    assert json.loads(file.read_text())["schema"] == "vision_plugin.edit/2"
    (change,) = Edit.load(file, sae=sae)
    assert change.where == Where({9: 0.25, 1: 0.5}, outside=True)
    assert str(edit) == str(Edit.load(file, sae=sae))
    with pytest.raises(ValueError, match="where= names no latent"):
        Where({})
    with pytest.raises(ValueError, match="threshold nan for latent 3"):
        Where({3: float("nan")})
    with pytest.raises(ValueError, match="latent 48 is out of range"):
        Edit.add(sae, {5: 2.0}, where=Where({48: 0.1}))
    with pytest.raises(ValueError, match="where= asks latents"):
        Edit.clamp(HOOK, {1: 2.0}, where=Where({9: 0.3}))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), "vision_plugin.edit/3", "update vision_plugin"),
        (("schema",), "other/1", "is not an edit"),
        (("changes", 0, "operation"), "explode", "operation='explode'"),
        (("changes", 0, "targets"), [1.5], "1.5 is not the number of a latent"),
        (("changes", 0, "targets"), [-1], "neuron -1 is out of range"),
        (("changes", 0, "amounts"), [], "0 amounts stand for 1 neurons"),
        (("changes", 0, "tokens"), "clss", "tokens='clss' is not a kind"),
        (("changes", 0, "basis"), {"kind": "magic"}, "'magic' is nothing that an edit counts in"),
        (("changes", 0, "basis"), 3, "does not hold what an edit holds"),
        (("changes", 0, "keep_norm"), "yes", "neither true nor false"),
        (("changes", 0, "operation"), ["x"] * 2_000, "operation=a list of 2000 is none of clamp"),
        (("changes", 0, "amounts"), [10**400], "a whole number of 1329 bits is not a number that"),
        (("changes", 0, "above"), "x" * 9_000, r"'x{80}\.\.\.' is not a number that"),
        (("changes", 0, "tokens"), "x" * 9_000, r"tokens='x{80}\.\.\.' is not a kind"),
        (("changes", 0, "basis"), {"kind": "x" * 9_000}, r"'x{80}\.\.\.' is nothing that an edit"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, path, value, message) -> None:
    content = Edit.clamp(HOOK, {1: 2.0}).to_dict()
    at = content
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    file = tmp_path / "edit.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Edit.load(file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: Edit.clamp(s, {48: 1.0}), "latent 48 is out of range: there are 48"),
        (lambda s: Edit.clamp(s, {1: float("nan")}), "cannot be set to nan"),
        (lambda s: Edit.clamp(s, {}), "at least one latent"),
        (lambda s: Edit.suppress(s, [3, 3], to={3: 1.0}) and Edit.of("clamp", s, {}), "at least"),
        (lambda s: Edit.suppress(s), "name the latents to take away"),
        (lambda s: Edit.suppress(s, [3], to={4: 1.0}), "to= has no value for 3"),
        (lambda s: Edit.scale(s, {3: 1.0}, maxima={3: 1.0}), "maxima= has no meaning for scale"),
        (lambda s: Edit.clamp(s, {3: 1.0}, tokens="cls", patches=[1]), "leaves them out"),
        (lambda s: Edit.clamp(HOOK, {3: 1.0}, include_error=False), "name an SAE's latents"),
        (lambda s: Edit.project(HOOK, [1]), "needs directions or an SAE"),
        (lambda s: Directions(HOOK, vectors(2), readers=vectors(3)), "one reader per vector"),
        (lambda s: Directions(HOOK, vectors(1) / 0), "NaN or infinity"),
    ],
)
def test_bad_edits_are_refused(sae, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(sae)


def test_an_edit_of_another_model_is_refused(model, sae) -> None:
    wide = torch.randn(1, 40)
    with pytest.raises(ValueError, match=r"40 wide, but blocks\.1\.hook_resid_post of .* has 32"):
        model.edit(Edit.add(Directions(HOOK, wide), {0: 1.0})).__enter__()
    with pytest.raises(ValueError, match=r"blocks\.9"):
        model.edit(Edit.clamp("blocks.9.hook_resid_post", {0: 1.0})).__enter__()
    other = make_sae()
    other.cfg.metadata["model_signature"] = [1.0, 2.0]
    with pytest.raises(ValueError, match="check_model=False"):
        model.edit(Edit.clamp(other, {5: 1.0})).__enter__()
    with model.edit(Edit.clamp(other, {5: 1.0}), check_model=False):
        pass
    with model.steer(other, {5: 1.0}, check_model=False):
        pass


@torch.no_grad()
def test_steer_and_effects_take_an_edit(model, pixels, sae) -> None:
    edit = Edit.clamp(sae, {5: 50.0}, tokens="all")
    with model.steer(sae, {5: 50.0}):
        expected = model(pixels)
    with model.steer(edit):
        assert torch.equal(model(pixels), expected)
    with pytest.raises(ValueError, match="names its latents itself"):
        model.steer(edit, {5: 1.0})
    with pytest.raises(ValueError, match="latents= is missing"):
        model.steer(sae)
    concepts = ["a red circle", "a blue square", "a green star"]
    texts = model.encode_text(concepts)
    effect = edit_effect(model, edit, pixels, texts, concepts=concepts)
    unit = torch.nn.functional.normalize(expected, dim=-1)
    after = torch.softmax(model.logit_scale * unit @ texts.T, dim=-1)
    torch.testing.assert_close(effect.after, after, rtol=1e-4, atol=1e-5)
    names = effect.concepts
    images = EffectPass(model, sae, pixels, texts, concepts=names, tokens="cls")
    torch.testing.assert_close(images.effect(edit).after, after, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_control_is_edited_as_an_sae_is(model, pixels) -> None:
    control = random_dictionary(32, 20, k=None, seed=0).at(HOOK)
    row = control.W_dec[3]
    expected = model.run_with_hooks(
        pixels, fwd_hooks=[(HOOK, lambda x, hook: x + (6 - x @ row)[..., None] * row)]
    )
    with model.edit(Edit.clamp(control, {3: 6.0})):
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_cached_pass_runs_only_the_blocks_that_remain(model, pixels, sae) -> None:
    ran: list[int] = []
    images = EditPass(model, pixels)
    images.embed(Edit.clamp(sae, {5: 1.0}))
    blocks = model.native.vision_model.encoder.layers
    handles = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(blocks)
    ]
    try:
        images.embed(Edit.clamp(sae, {5: 3.0}))
    finally:
        for handle in handles:
            handle.remove()
    assert images.stream(2).shape == (3, 17, 32)
    assert model.native is not None
    assert set(ran) <= {2}


@torch.no_grad()
@pytest.mark.parametrize(("options", "n"), [({"tokens": "cls"}, 1), ({"patches": [3, 0]}, 2)])
def test_only_the_tokens_that_change_are_encoded(
    model, pixels, options, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = random_dictionary(32, 48, k=None, seed=0).at(HOOK)
    edit = Edit.suppress(sae, [5], **options)
    images = EditPass(model, pixels)
    with model.edit(edit):
        expected = model.encode_image(pixels, normalize=False)
    images.embed(Edit.suppress(sae, [7], tokens="all"))  # the decoder is examined once
    seen: list[int] = []
    encode = sae.encode

    def counting(x: Tensor) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return encode(x)

    monkeypatch.setattr(sae, "encode", counting)
    torch.testing.assert_close(images.embed(edit), expected, rtol=1e-4, atol=2e-5)
    assert seen == [n * len(pixels)]
    images.embed(Edit.suppress(sae, [9], **options))  # and what is read once is known
    torch.testing.assert_close(images.embed(edit), expected, rtol=1e-4, atol=2e-5)
    assert seen == [n * len(pixels)]


SWAPS = {
    "latents": (Edit.swap(S, [5, 9]), lambda x, y: x + (f2(y) - f2(x)) @ S.W_dec[[5, 9]]),
    "neurons": (
        Edit.swap(HOOK, [4, 6]),
        lambda x, y: torch.cat([x[..., :4], y[..., 4:5], x[..., 5:6], y[..., 6:7], x[..., 7:]], -1),
    ),
    "directions": (
        Edit.swap(Directions(HOOK, D)),
        lambda x, y: x + (y - out_of(y, D)) - (x - out_of(x, D)),
    ),
    "where the latent is active": (
        Edit.swap(S, [5], above=0.2),
        lambda x, y: torch.where(
            f(S, x, 5) > 0.2, x + (f(S, y, 5) - f(S, x, 5)) * S.W_dec[5], x
        ),
    ),
}  # fmt: skip


def f2(x: Tensor) -> Tensor:
    return S.encode(x)[..., [5, 9]]


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["all", "cls", "patch"])
@pytest.mark.parametrize("case", SWAPS)
def test_a_swap_takes_the_values_of_other_images(model, pixels, case: str, tokens: str) -> None:
    edit, formula = SWAPS[case]
    mask = model.token_layout().mask(tokens)[None, :, None]
    others = pixels.flip(0) * 0.5
    _, cache = model.run_with_cache(others, names_filter=HOOK)

    def hook_function(x: Tensor, hook: object) -> Tensor:
        return torch.where(mask, formula(x, cache[HOOK]), x)

    expected = model.run_with_hooks(pixels, fwd_hooks=[(HOOK, hook_function)])
    with model.edit(edit.with_tokens(tokens), source=others):
        got = model(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert (model(pixels) - got).abs().max() > 1e-4
    run, source = EditPass(model, pixels, batch_size=2), EditPass(model, others)
    cached = run.embed(edit.with_tokens(tokens), source=source)
    torch.testing.assert_close(cached, expected, rtol=1e-4, atol=2e-5)
    same = run.embed(edit.with_tokens(tokens), source=run)
    torch.testing.assert_close(same, model(pixels), rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_swapping_every_neuron_of_every_token_gives_the_other_image(model, pixels) -> None:
    others = pixels.flip(0) * 0.5
    run, source = EditPass(model, pixels, batch_size=2), EditPass(model, others)
    for hook_name, width in ((HOOK, 32), ("blocks.0.hook_resid_pre", 32)):
        edit = Edit.swap(hook_name, range(width))
        torch.testing.assert_close(
            run.embed(edit, source=source), source.embed(), rtol=1e-4, atol=1e-5
        )
    inside = Edit.swap(MLP, [1, 2]) + Edit.swap(Z, [0])
    with model.edit(inside, source=others):
        expected = model(pixels)
    torch.testing.assert_close(run.embed(inside, source=source), expected, rtol=1e-4, atol=1e-5)


def test_a_swap_is_json_and_says_what_it_lacks(model, pixels, tmp_path: Path) -> None:
    edit = Edit.swap(Directions(HOOK, D), tokens="cls")
    edit.save(tmp_path / "edit.json")
    again = Edit.load(tmp_path / "edit.json")
    assert str(again) == str(edit)
    assert str(edit).startswith("swap direction 0, 1, 2 (")
    with pytest.raises(ValueError, match="give them with source="), model.edit(edit):
        model(pixels)
    run = EditPass(model, pixels)
    with pytest.raises(ValueError, match="give them with source="):
        run.embed(edit)
    with pytest.raises(ValueError, match=r"source= has 1 images for 3"):
        run.embed(edit, source=EditPass(model, pixels[:1]))
    with (
        pytest.raises(ValueError, match=r"source= has 1 images for a batch of 3"),
        model.edit(edit, source=pixels[:1]),
    ):
        model(pixels)
    with pytest.raises(ValueError, match="name the latents to swap"):
        Edit.swap(S)
    with pytest.raises(ValueError, match="maxima= has no meaning for swap"):
        Edit.swap(S, [1], maxima={1: 2.0})


@torch.no_grad()
def test_a_mended_model_is_a_file(tiny_clip, pixels, sae, tmp_path) -> None:
    sae.save_model(str(tmp_path / "sae"))
    edit = Edit.clamp(sae, {5: 7.0}) + Edit.scale(MLP, {3: 2.0})
    edit.save(tmp_path / "edit.json", sae="sae")
    mended, plain = vp.load_model(tiny_clip, edit=tmp_path / "edit.json"), vp.load_model(tiny_clip)
    with plain.edit(edit):
        expected = plain(pixels)
    torch.testing.assert_close(mended(pixels), expected, rtol=0, atol=1e-6)
    with mended.edit(Edit.clamp(HOOK, {4: 9.0})):
        pass
    mended.reset_hooks()
    torch.testing.assert_close(mended(pixels), expected, rtol=0, atol=1e-6)
    mended.reset_edits()
    assert torch.equal(mended(pixels), plain(pixels))


@torch.no_grad()
def test_a_standing_edit_comes_along_with_a_copy_and_goes_with_a_reset(
    tiny_clip: str, pixels: Tensor, sae: StandardSAE
) -> None:
    model = vp.load_model(tiny_clip)
    plain = model(pixels)
    model.add_edit(Edit.clamp(MLP, {3: 5.0}))
    expected = model(pixels)
    again = copy.deepcopy(model)
    sent = pickle.loads(pickle.dumps(model))  # noqa: S301  # our own bytes
    for one in (again, sent):
        assert torch.equal(one(pixels), expected)
        one.reset_edits()
        assert torch.equal(one(pixels), plain)
    assert torch.equal(model(pixels), expected)
    model.add_edit(Edit.clamp(sae, {5: 5.0}))
    with pytest.raises(TypeError, match=r"reset_edits\(\)"):
        pickle.dumps(model)
    model.reset_hooks(including_permanent=True)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(one(pixels), plain)


@torch.no_grad()
@pytest.mark.parametrize("hook_name", [HOOK, Z])
def test_a_token_keeps_its_norm_with_all_its_heads(model, pixels, hook_name: str) -> None:
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: object) -> None:
        seen.append(activation.flatten(2).clone())

    with model.hooks(fwd_hooks=[(hook_name, keep)]):
        model(pixels)
        with model.edit(Edit.clamp(hook_name, {1: 9.0}, keep_norm=True)):
            model(pixels)
    # The second pass is seen before the edit: hooks run in the order in which they were added.
    with (
        model.edit(Edit.clamp(hook_name, {1: 9.0}, keep_norm=True)),
        model.hooks(fwd_hooks=[(hook_name, keep)]),
    ):
        model(pixels)
    before, _, after = seen
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-4, atol=1e-5)
    others = torch.arange(32) != 1
    share = after[..., others] / before[..., others]
    assert torch.allclose(share, share[..., :1].expand_as(share), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_an_edit_pass_keeps_the_order_in_which_a_model_runs(model, pixels) -> None:
    clamp = Edit.clamp("blocks.1.hook_resid_pre", {4: 3.0})
    scale = Edit.scale("blocks.0.hook_resid_post", {4: 5.0})
    for edit in (clamp + scale, scale + clamp):
        with model.edit(edit):
            expected = model.encode_image(pixels, normalize=False)
        found = EditPass(model, pixels).embed(edit)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_edit_names_its_tokens_itself(model, sae) -> None:
    with pytest.raises(ValueError, match=r"names its tokens itself: edit.with_tokens"):
        model.steer(Edit.clamp(sae, {5: 1.0}), tokens="cls")


def test_an_edit_of_two_saes_says_where_each_lies(model, pixels, tmp_path) -> None:
    saes = {}
    for layer in (0, 1):
        sae = make_sae(seed=layer, hook_name=f"blocks.{layer}.hook_resid_post")
        (tmp_path / "saes").mkdir(exist_ok=True)
        sae.save_model(str(tmp_path / "saes" / str(layer)))
        saes[f"saes/{layer}"] = sae
    first, second = saes.values()
    edit = Edit.clamp(first, {2: 9.0}) + Edit.scale(second, {3: -2.0})
    edit.save(tmp_path / "edit.json", sae=saes)
    again = Edit.load(tmp_path / "edit.json")
    assert again.hook_names == ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    with torch.no_grad(), model.edit(edit):
        expected = model.encode_image(pixels)
    with torch.no_grad(), model.edit(again):
        assert torch.equal(model.encode_image(pixels), expected)
    edit.save(tmp_path / "edit.json", sae={"saes/0": first})
    with pytest.raises(ValueError, match="does not say where its SAE lies"):
        Edit.load(tmp_path / "edit.json")
