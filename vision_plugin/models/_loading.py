"""``load_model`` makes a bridge from a name or a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vision_plugin._device import usable_device
from vision_plugin.models._attaching import mended
from vision_plugin.models._bridge import VisionBridge
from vision_plugin.models._open_clip import load_open_clip
from vision_plugin.models._timm import load_timm
from vision_plugin.models._transformers import load_transformers

LOADERS: dict[str, Callable[[str, str | None, str | None], VisionBridge]] = {
    "hf": load_transformers,
    "open_clip": load_open_clip,
    "timm": load_timm,
}
"""Loaders by the prefix of a name, before the colon."""


def load_model(
    name: str,
    *,
    pretrained: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    edit: str | Path | None = None,
) -> VisionBridge:
    """Load a vision transformer as a TransformerLens bridge, with its own preprocessing.

    Args:
        name: ``"openai/clip-vit-base-patch32"`` (Hugging Face id), a local folder,
            ``"open_clip:ViT-B-32"``, ``"timm:vit_base_patch14_dinov2.lvd142m"``, or ``"demo"``
            for the small CLIP that comes with this package.
        pretrained: Tag or file of weights for open_clip; a local checkpoint file for timm.
        device: Device of the weights; the CPU by default.
        dtype: Type of the weights.
        revision: Branch, tag or commit on the hub.
        edit: JSON file of an edit that the model makes in its forward passes from then on, as
            ``vision-plugin tasks`` writes it: a mended model. Extraction, training and
            ``Harvester`` read the native module, which no edit reaches.

    Raises:
        ValueError: nothing is found under that name, its kind of model is not supported, or this
            machine lacks the device.

    Examples:
        >>> model = vp.load_model("demo")
        >>> model.cfg.n_layers, model.cfg.d_model, model.token_layout().n_tokens
        (4, 128, 65)
    """
    usable_device(device)
    source, _, rest = name.partition(":")
    if rest and source in LOADERS:
        model = LOADERS[source](rest, pretrained, revision)
    else:
        model = LOADERS["hf"](name, pretrained, revision)
    model.eval()
    if model.dtype != dtype or device is not None:
        model.to(device=device or model.device, dtype=dtype)
    return model if edit is None else mended(model, edit, device=model.device)
