"""``wrap`` makes a bridge from a module, with the adapter of the module's class."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from PIL import Image
from torch import nn

from vision_plugin.models._bridge import VisionBridge
from vision_plugin.models._errors import HOW_TO_ADD, UnsupportedModelError
from vision_plugin.models._processing import (
    HuggingFaceImages,
    HuggingFaceTexts,
    ImageProcessor,
    PlainTexts,
    TextProcessor,
    TorchvisionImages,
)
from vision_plugin.models._square_patches import SquarePatches

ENTRY_POINTS = "transformer_lens.architectures"
OWN_ENTRY_POINTS = "vision_plugin.architectures"
_LIBRARIES = {"timm": "Timm", "open_clip": "OpenClip"}
"""Prefix of an architecture's entry-point name, by the library that defines the module class."""


def wrap(
    module: nn.Module,
    *,
    name: str | None = None,
    image_processor: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
) -> VisionBridge:
    """Put a native vision transformer under TransformerLens names.

    The module stays untouched: the bridge is a copy of its structure and shares every weight with
    it. If a model contains a supported tower (LLaVA, a masked autoencoder with its decoder), the
    bridge wraps the tower.

    Args:
        module: A vision tower or an image-text model of a supported family.
        name: Name of the model in errors, SAEs and reports; the class name by default.
        image_processor: Turns images into pixels: a transformers image processor or a torchvision
            transform.
        tokenizer: A transformers tokenizer, or a function from texts to the text tower's arguments.
        revision: The checkpoint's revision, kept for records.

    Raises:
        UnsupportedModelError: no adapter fits; the message says which part did not match.

    Examples:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
        >>> mine = vp.wrap(tower, name="mine")
        >>> mine.cfg.n_layers, mine.token_layout().n_tokens
        (2, 17)
    """
    name = name or type(module).__name__
    architecture, adapter_class = find_adapter(module)
    if tower := inner_tower(adapter_class):
        inner = part_of(module, tower, name)
        return wrap(
            inner,
            name=name,
            image_processor=image_processor,
            tokenizer=tokenizer,
            revision=revision,
        )
    bridge = VisionBridge.over(
        module, name=name, architecture=architecture, adapter_class=adapter_class
    )
    adapter, images = bridge.adapter, _image_processor(image_processor)
    bridge.image_processor, bridge.revision = images, revision
    try:
        bridge.tokenizer = _text_processor(tokenizer, module, adapter)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{name}: tokenizer= needs a model with a text tower, and this one does not say how "
            f"long its texts are ({error}). Leave tokenizer= out"
        ) from error
    if adapter.tower_dimensions.any_size and images is not None:
        adapter.tower_dimensions = _processed_size(adapter.tower_dimensions, images)
    return bridge


@cache
def adapters() -> dict[str, Any]:
    """Return entry points of adapters by architecture name, from this and other packages.

    This package's own group comes first: TransformerLens has its own adapters for some
    architectures, and its group cannot replace them.

    Examples:
        >>> "CLIPModel" in vp.models.adapters()
        True
    """
    found: dict[str, Any] = {}
    for group in (ENTRY_POINTS, OWN_ENTRY_POINTS):
        found.update({entry.name: entry for entry in entry_points(group=group)})
    return found


def find_adapter(module: nn.Module) -> tuple[str, Any]:
    """Return architecture name and adapter class for a module's class or its base classes.

    Raises:
        UnsupportedModelError: no entry point has a matching name.
    """
    for cls in type(module).__mro__:
        library = cls.__module__.partition(".")[0]
        name = _LIBRARIES.get(library, "") + cls.__name__
        if name in adapters():
            return name, adapters()[name].load()
    cls = type(module)
    raise UnsupportedModelError(
        f"no adapter for {cls.__module__}.{cls.__name__}. Supported: "
        f"{', '.join(sorted(adapters()))}. {HOW_TO_ADD}"
    )


def inner_tower(adapter_class: Any) -> str | None:
    """Return the path of the vision tower if an entry point says that a model contains one."""
    return getattr(adapter_class, "inner_path", None)


def part_of(module: nn.Module, path: str, name: str) -> nn.Module:
    """Return a part of a model by its path; raise UnsupportedModelError if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{name}: a {type(module).__name__} has its vision tower in {path!r}, but this one "
            f"has no such part. {HOW_TO_ADD}"
        ) from error


def _processed_size(dims: Any, images: ImageProcessor) -> Any:
    """Return the sizes of a tower that takes any image, with its preprocessing's image size."""
    height, width = images([Image.new("RGB", (dims.image_size[1], dims.image_size[0]))]).shape[-2:]
    return replace(dims, image_size=(height, width))


def _image_processor(processor: Any) -> ImageProcessor | None:
    if processor is None or hasattr(processor, "fingerprint"):
        return processor  # type: ignore[no-any-return]
    if hasattr(processor, "max_num_patches"):
        return SquarePatches(processor)
    if hasattr(processor, "to_dict"):
        return HuggingFaceImages(processor)
    return TorchvisionImages(processor)


def _text_processor(tokenizer: Any, module: nn.Module, adapter: Any) -> TextProcessor | None:
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "pad"):
        return PlainTexts(tokenizer)
    config: Any = getattr(module.config, "text_config", module.config)
    return HuggingFaceTexts(
        tokenizer,
        int(config.max_position_embeddings),
        padding=adapter.text_padding,
        mask=adapter.text_mask,
    )
