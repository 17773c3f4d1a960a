"""Second-order effects against a path patch of the native module with plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor
from transformers import CLIPModel

import vision_plugin as vp
from tests._clip import make_sae
from tests._clip import model as model  # the fixtures
from tests._clip import pixels as pixels
from tests.models.test_decompose import bridged, worst
from vision_plugin.lens import second_order, second_order_effects
from vision_plugin.models import UnsupportedModelError, VisionBridge


@torch.no_grad()
def patched(folder: str, pixels: Tensor, written: Tensor, first: int) -> Tensor:
    """What ``written`` (at all tokens) adds to the embedding through heads of layers >= first.

    Plain hooks on the native module; attention and the statistics of all norms as in the plain run.
    """
    native = CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()
    tower, seen = native.vision_model, {}
    for number, layer in enumerate(tower.encoder.layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, n=number: seen.update(
                {f"in {n}": args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        layer.self_attn.register_forward_hook(
            lambda _, args, output, n=number: seen.update({f"pattern {n}": output[1]})
        )
    tower.post_layernorm.register_forward_pre_hook(lambda _, args: seen.update({"token": args[0]}))
    native.get_image_features(pixels)

    def through(norm: torch.nn.LayerNorm, x: Tensor, of: Tensor) -> Tensor:
        """The norm's linear part with the statistics of another input."""
        sigma = (of.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        return norm.weight * (x - x.mean(-1, keepdim=True)) / sigma

    total = torch.zeros(len(pixels), native.config.projection_dim)
    for number in range(first, len(tower.encoder.layers)):
        layer = tower.encoder.layers[number]
        attention = layer.self_attn
        read = through(layer.layer_norm1, written, seen[f"in {number}"])
        values = read @ attention.v_proj.weight.T
        heads = values.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        z = (seen[f"pattern {number}"] @ heads).transpose(1, 2).flatten(2)
        out = (z @ attention.out_proj.weight.T)[:, 0]
        token = seen["token"]
        token = token[:, 0] if token.ndim == 3 else token
        normed = through(tower.post_layernorm, out, token)
        total += normed @ native.visual_projection.weight.T
    return total


@pytest.mark.parametrize("layer", [0, 1])
def test_neurons_sum_to_a_path_patch_of_their_mlp(
    tiny_clip: str, model: VisionBridge, pixels: Tensor, layer: int
) -> None:
    effects = second_order_effects(model, pixels, layer)
    assert effects.shape == (3, 64, 16)
    _, cache = model.run_with_cache(pixels, names_filter=f"blocks.{layer}.mlp.hook_post")
    weight = model.native.vision_model.encoder.layers[layer].mlp.fc2.weight
    acts = cache[f"blocks.{layer}.mlp.hook_post"].detach()
    whole = patched(tiny_clip, pixels, acts @ weight.detach().T, layer + 1)
    assert worst(effects.sum(1), whole) < 1e-5
    for neuron in (0, 7, 63):  # and each neuron is its own path patch
        own = acts[..., neuron, None] * weight.detach()[:, neuron]
        assert worst(effects[:, neuron], patched(tiny_clip, pixels, own, layer + 1)) < 1e-5
    some = second_order_effects(model, pixels, layer, which=[7, 63])
    assert torch.allclose(some, effects[:, [7, 63]], atol=1e-6)


@pytest.mark.parametrize("tokens", ["all", "patch"])
def test_latents_sum_to_a_path_patch_of_what_they_decode(
    tiny_clip: str, model: VisionBridge, pixels: Tensor, tokens: str
) -> None:
    sae = make_sae("blocks.0.hook_resid_post")
    sae.cfg.metadata.tokens = tokens
    _, cache = model.run_with_cache(pixels, names_filter="blocks.0.hook_resid_post")
    latents = sae.encode(cache["resid_post", 0])
    decoded = (latents @ sae.W_dec).detach()
    if tokens == "patch":
        decoded[:, 0] = 0
    effects = second_order_effects(model, pixels, sae)
    assert effects.shape == (3, 48, 16)
    assert worst(effects.sum(1), patched(tiny_clip, pixels, decoded, 1)) < 1e-5


@pytest.mark.parametrize(
    "label", ["transformers: Dinov2Model", "open_clip: ViT-B-32", "timm: vit_base_patch16_224"]
)
def test_all_neurons_are_what_a_change_of_the_values_writes(label: str) -> None:
    """Other families, another way: the MLP's part is added to the values, the pattern held.

    One later layer is left, so the effect is that layer's heads' alone.
    """
    model, pixels = bridged(label)
    effects = second_order_effects(model, pixels, 0)
    _, cache = model.run_with_cache(pixels)
    block = model.blocks[0]
    post = cache["blocks.0.mlp.hook_post"].detach()
    written = post @ block.mlp.out.original_component.weight.detach().T
    if "ln2_post" in block._modules:
        written = block.ln2_post.original_component(written).detach()
    stream = cache["blocks.1.hook_resid_pre"].detach()
    norm = model.blocks[1].ln1.original_component
    centred = written - written.mean(-1, keepdim=True)
    sigma = (stream.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    values = (centred / sigma * norm.weight) @ _weight(model, 1).T

    def add(v: Tensor, hook: object) -> Tensor:
        return v + values.reshape(v.shape)

    with torch.no_grad():
        pattern = cache["blocks.1.attn.hook_pattern"]
        with model.hooks(
            fwd_hooks=[
                ("blocks.1.attn.hook_v", add),
                ("blocks.1.attn.hook_pattern", lambda p, hook: pattern.clone()),
            ]
        ):
            _, edited = model.run_with_cache(pixels, names_filter="blocks.1.hook_attn_out")
    change = (edited["blocks.1.hook_attn_out"] - cache["blocks.1.hook_attn_out"])[:, :1]
    last = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][:, :1].detach()
    linear = model.adapter.readout(model).of(last)
    assert model.cfg.n_layers == 2
    assert worst(effects.sum(1), linear.part(change)) < 1e-4


def _weight(model: VisionBridge, layer: int) -> Tensor:
    weight: Tensor = model.blocks[layer].attn.v.original_component.weight
    return weight.detach()


def test_directions_are_first_singular_vectors_of_the_largest_effects(
    model: VisionBridge, pixels: Tensor
) -> None:
    many = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    found = second_order(model, many, 0, which=[3, 9], n_top=5, batch_size=5)
    effects = second_order_effects(model, many, 0, which=[3, 9]).double()
    for place, neuron in enumerate((3, 9)):
        own = effects[:, place]
        np.testing.assert_allclose(found.effects(neuron).numpy(), own.numpy(), atol=1e-6)
        away = (own - own.mean(0)).norm(dim=1)
        top = own[away.argsort(descending=True)[:5]]
        expected = np.linalg.svd(top.numpy(), full_matrices=False)[2][0]
        direction = found.direction(neuron).numpy()
        assert abs(float(direction @ expected)) == pytest.approx(1, abs=1e-6)
        assert ((top.numpy() @ direction) > 0).mean() >= 0.5
        assert 0 <= found.explained(neuron) <= 1
    strength = effects.norm(dim=2).mean(0)
    torch.testing.assert_close(found.strength(), strength, atol=1e-6, rtol=1e-5)


def test_words_are_the_code_that_scikit_learn_finds(model: VisionBridge) -> None:
    many = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    found = second_order(model, many, 0, which=[3], n_top=6)
    texts = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
    atoms = (texts - texts.mean(0)).double()
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    names = [f"word {place}" for place in range(20)]
    direction = found.direction(3)
    # matching pursuit, written out: the best atom, then least squares over all chosen ones
    chosen: list[int] = []
    left = direction
    for _ in range(4):
        chosen.append(int((atoms @ left).abs().argmax()))
        code = torch.linalg.lstsq(atoms[chosen].T, direction[:, None]).solution[:, 0]
        left = direction - code @ atoms[chosen]
    words = found.words(3, texts, names, n_words=4)
    assert set(words.texts) == {names[place] for place in chosen}
    assert words.explained == pytest.approx(1 - float(left.square().sum()), abs=1e-6)
    lasso = found.words(3, texts, names, n_words=20, solver="lasso", alpha=0.01)
    fit = Lasso(alpha=0.01, fit_intercept=False).fit(atoms.T.numpy(), direction.numpy())
    assert len(lasso.texts) == int((fit.coef_ != 0).sum())
    entry = found.to_dict(texts, names, n_words=3)["components"][0]
    assert len(entry["words"]) == 3
    assert found.table(texts, names).row_count == 1
    assert found.plot().axes[0].get_ylabel() == "share of the first direction"


def test_what_has_no_second_order_effect_is_refused(model: VisionBridge, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="no head comes after the neurons of layer 2"):
        second_order_effects(model, pixels, 2)
    with pytest.raises(ValueError, match=r"which= names 64, but the neurons of layer 0 are 0 to 6"):
        second_order_effects(model, pixels, 0, which=[64])
    with pytest.raises(ValueError, match=r"no head 7\.0"):
        second_order_effects(model, pixels, 7)
    with pytest.raises(ValueError, match="none of its hooks"):
        second_order_effects(model, pixels, make_sae("blocks.0.mlp.hook_post", 64))
    siglip, images = bridged("transformers: SiglipModel")
    with pytest.raises(UnsupportedModelError, match="no class token"):
        second_order_effects(siglip, images, 0)
    with pytest.raises(ValueError, match="was not read"):
        second_order(model, pixels, 0, which=[3]).effects(4)
    gated, images = bridged("timm: vit_base_patch16_rpn_224")
    with pytest.raises(UnsupportedModelError):
        second_order_effects(gated, images, 0)
    assert vp.lens.second_order is second_order
