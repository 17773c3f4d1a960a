"""Steerability the slow way: one full native forward per latent, with plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

SCALE = 20.0


def tiny_clip(*, seed: int = 0, n_layers: int = 3, dtype: torch.dtype = torch.float32) -> CLIPModel:
    """A random CLIP of 5 tokens whose answers depend on its images."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 8,
    }
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    model = CLIPModel(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.logit_scale.fill_(torch.tensor(SCALE).log())
    return model


def standard_sae(hook_name: str, d_in: int, *, d_sae: int = 6, seed: int = 0, **cfg: Any) -> SAE:
    """A random ReLU SAE."""
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, **cfg))
    return _randomise(sae, hook_name, seed)


def topk_sae(hook_name: str, d_in: int, *, d_sae: int = 6, seed: int = 0, **cfg: Any) -> SAE:
    """A random TopK SAE, whose decoder divides by the norms of its rows by default."""
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=2, **cfg))
    return _randomise(sae, hook_name, seed)


def _randomise(sae: SAE, hook_name: str, seed: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sae.cfg.metadata = SAEMetadata(hook_name=hook_name)
    return sae


def native_place(model: CLIPModel, hook_name: str) -> tuple[nn.Module, bool]:
    """The native module behind a canonical name; True where its input is meant."""
    tower = model.vision_model
    outside = {
        "embed.hook_out": (tower.embeddings, False),
        "hook_embed": (tower.pre_layrnorm, False),
        "ln_final.hook_out": (tower.post_layernorm, False),
    }
    if hook_name in outside:
        return outside[hook_name]
    _, number, rest = hook_name.split(".", 2)
    block = tower.encoder.layers[int(number)]
    inside = {
        "hook_resid_pre": (block, True),
        "hook_resid_post": (block, False),
        "hook_resid_mid": (block.layer_norm2, True),
        "hook_attn_out": (block.self_attn, False),
        "hook_mlp_out": (block.mlp, False),
        "attn.hook_q": (block.self_attn.q_proj, False),
        "attn.hook_z": (block.self_attn.out_proj, True),
        "mlp.hook_pre": (block.mlp.fc1, False),
        "mlp.hook_post": (block.mlp.fc2, True),
    }
    return inside[rest]


def edit_at(model: CLIPModel, hook_name: str, edit: Callable[[Tensor], Tensor]) -> Any:
    """Put ``edit`` on the native module; returns PyTorch's handle."""
    module, is_input = native_place(model, hook_name)
    if is_input:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            del module
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return module.register_forward_hook(after)


@torch.no_grad()
def probabilities(model: CLIPModel, pixels: Tensor, texts: Tensor) -> Tensor:
    """Probabilities of the concepts by the native model, float64."""
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    image = nn.functional.normalize(model.visual_projection(pooled).double(), dim=-1)
    unit = nn.functional.normalize(texts.double(), dim=-1)
    return torch.softmax(model.logit_scale.double().exp() * image @ unit.T, dim=-1)


@torch.no_grad()
def slow_delta(
    model: CLIPModel,
    sae: Any,
    pixels: Tensor,
    texts: Tensor,
    *,
    strength: float,
    latents: list[int],
    rows: slice = slice(None),
    hook_name: str | None = None,
) -> Tensor:
    """Mean change of the probabilities, ``[k, c]``; ``rows`` are the tokens that are steered."""
    hook_name = hook_name or sae.cfg.metadata.hook_name
    before = probabilities(model, pixels, texts)
    changes = []
    for latent in latents:

        def edit(x: Tensor, latent: int = latent) -> Tensor:
            reconstruction = sae.decode(sae.encode(x))
            latents = sae.encode(x).clone()
            latents[..., latent] = strength
            steered = sae.decode(latents) + (x - reconstruction)
            if x.ndim == 2:
                return steered
            edited = x.clone()
            edited[:, rows] = steered[:, rows]
            return edited

        handle = edit_at(model, hook_name, edit)
        after = probabilities(model, pixels, texts)
        handle.remove()
        changes.append((after - before).mean(0))
    return torch.stack(changes)
