"""The random-model control: the same network with newly drawn weights."""

from __future__ import annotations

import copy

import torch

from vision_plugin.models import VisionBridge, wrap

_KEPT = ("logit_scale", "logit_bias")


@torch.no_grad()
def randomized_model(model: VisionBridge, *, seed: int = 0) -> VisionBridge:
    """Return a copy of a model with random weights.

    Every tensor of weights is drawn from a normal distribution with the tensor's own mean and
    standard deviation, so activations keep their size. The scale and bias of the logits stay.

    Args:
        model: the model, which stays as it is.
        seed: seed of the weights.

    Examples:
        >>> random = vp.evaluation.randomized_model(model, seed=0)
        >>> torch.equal(random.encode_image(pixels), embeddings)
        False
    """
    native = copy.deepcopy(model.native)
    generator = torch.Generator().manual_seed(seed)
    for name, weights in native.named_parameters():
        if name.rsplit(".", 1)[-1] in _KEPT:
            continue
        spread, mean = torch.std_mean(weights.double(), correction=0)
        drawn = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        weights.copy_(drawn.to(weights.device) * spread + mean)
    drawn_anew = wrap(native, name=f"{model.cfg.model_name} (random weights)")
    drawn_anew.image_processor, drawn_anew.tokenizer = model.image_processor, model.tokenizer
    drawn_anew.adapter.tower_dimensions = model.adapter.tower_dimensions
    drawn_anew.eval()
    return drawn_anew
