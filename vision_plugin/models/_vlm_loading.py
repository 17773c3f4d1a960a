"""``load_vlm`` and ``wrap_vlm`` make a bridge of a vision-language model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vision_plugin._device import usable_device
from vision_plugin.models._attaching import mended
from vision_plugin.models._errors import UnsupportedModelError, not_found
from vision_plugin.models._transformers import local_checkpoint
from vision_plugin.models._vlm import VisionLanguageBridge
from vision_plugin.models._vlm_language import language_bridge
from vision_plugin.models._vlm_tower import BridgedTower, Reach
from vision_plugin.models._wrapping import adapters, find_adapter, part_of, wrap


def load_vlm(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    device_map: Any = None,
    edit: str | Path | None = None,
) -> VisionLanguageBridge:
    """Load a vision-language model whose tower takes SAEs, edits and hooks.

    Args:
        name: Hugging Face id, local folder, or ``"demo"`` for the small LLaVA of the drawn world
            that comes with this package.
        device: Device of the weights; the CPU by default.
        dtype: Type of the weights.
        revision: Branch, tag or commit on the hub.
        device_map: transformers' ``device_map``, for models that one device does not hold.
        edit: JSON file of an edit of the tower that the model makes from then on, as
            ``vision-plugin tasks llava`` writes it: a mended model.

    Raises:
        ValueError: nothing is found under that name, this machine lacks the device, or the edit
            does not fit.
        UnsupportedModelError: no adapter fits a part; the message names it.

    Examples:
        >>> vlm = vp.load_vlm("demo")
        >>> vlm.vision.cfg.d_model, vlm.language.cfg.d_model
        (128, 128)
    """
    import transformers

    usable_device(device)
    name = str(name)
    if name == "demo":
        path = str(import_module("vision_plugin.demo").llava_path())
    else:
        path = local_checkpoint(name)
    try:
        config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(not_found(name, error)) from error
    architecture = next(iter(config.architectures or []), "")
    model_class = getattr(transformers, architecture, None)
    if model_class is None or architecture not in towers():
        raise UnsupportedModelError(_no_family(name, architecture or config.model_type))
    try:
        processor = transformers.AutoProcessor.from_pretrained(path, revision=revision)
        module = model_class.from_pretrained(
            path, revision=revision, dtype=dtype, device_map=device_map
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(not_found(name, error)) from error
    module.eval()
    if device is not None:
        module.to(device)
    vlm = wrap_vlm(module, processor, name=name, revision=revision)
    return vlm if edit is None else mended(vlm, edit, device=vlm.vision.device)


def wrap_vlm(
    module: nn.Module,
    processor: Any = None,
    *,
    name: str | None = None,
    revision: str | None = None,
) -> VisionLanguageBridge:
    """Join TransformerLens's bridge of a language model with our bridge of its vision tower.

    The module stays untouched; the bridge shares every weight with it.

    Args:
        module: transformers' LLaVA, LLaVA-NeXT, LLaVA-OneVision, Gemma 3, Idefics3 or SmolVLM with
            the language model's head.
        processor: The checkpoint's processor.
        name: Name of the model in errors and records; the class name by default.
        revision: The checkpoint's revision, kept for records.

    Raises:
        UnsupportedModelError: no adapter fits a part; the message names it.

    Examples:
        >>> mine = vp.wrap_vlm(vlm.native, vlm.processor, name="mine")
        >>> question = "What colour is shown?"
        >>> mine.generate(world.images[:1], question) == vlm.generate(world.images[:1], question)
        True
    """
    name = name or type(module).__name__
    try:
        architecture, family = find_adapter(module)
    except UnsupportedModelError:
        family = None
    if not reads_images(family):
        raise UnsupportedModelError(_no_family(name, type(module).__name__))
    native_tower = part_of(module, family.inner_path, name)
    try:
        vision = wrap(
            native_tower,
            name=name,
            image_processor=getattr(processor, "image_processor", None),
            revision=revision,
        )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{name}: its vision tower, {family.inner_path}, is a {type(native_tower).__name__}, "
            f"which does not fit ({error})"
        ) from error
    n_states = int(vision.cfg.n_layers) + 1
    layers = family.layers_read(module.config)
    counted = None if layers is None else tuple(layer % n_states for layer in layers)
    reach = Reach(name, counted, family.reads_cls(module.config))
    tower = BridgedTower(vision, reach)
    language = language_bridge(
        module,
        tower,
        family.inner_path,
        architecture=family.lens_architecture or architecture,
        name=name,
    )
    return VisionLanguageBridge(
        module, vision, language, reach, processor, tower_path=family.inner_path
    )


def towers() -> dict[str, Any]:
    """Return where vision-language models keep their towers, by architecture name."""
    families = {
        name: entry.load()
        for name, entry in adapters().items()
        if name.endswith("ForConditionalGeneration")
    }
    return {name: family for name, family in families.items() if reads_images(family)}


def reads_images(family: Any) -> bool:
    """Return whether an adapter says what of its tower a language model reads."""
    return hasattr(family, "layers_read")


def _no_family(name: str, architecture: str) -> str:
    joined = sorted(name for name, family in towers().items() if family.joins)
    return (
        f"{name} is a {architecture}, which is no vision-language model that is supported: use one "
        f"of {', '.join(joined)}; vision_plugin.wrap takes a vision tower alone"
    )
