"""``load_model`` and ``wrap``: from a name, a folder or a module in hand to a bridge."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vision_plugin.models._bridge import VisionBridge
from vision_plugin.models._processing import (
    HuggingFaceImages,
    HuggingFaceTexts,
    ImageProcessor,
    TextProcessor,
    TorchvisionImages,
)

logger = logging.getLogger(__name__)

ENTRY_POINTS = "transformer_lens.architectures"
_LIBRARIES = {"timm": "Timm", "open_clip": "OpenClip"}
"""Prefix of an architecture's entry-point name by the library its module class comes from."""


class UnsupportedModelError(ValueError):
    """A module that no adapter fits."""


def wrap(
    module: nn.Module,
    *,
    name: str | None = None,
    processor: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
) -> VisionBridge:
    """Put a native vision transformer under TransformerLens names.

    The module itself is not touched: the bridge is built on a copy of its structure that shares
    every weight with it.

    Args:
        module: A vision tower or an image-text model of a supported family.
        name: What errors, SAEs and reports call it; the class name by default.
        processor: Pictures to pixels: a transformers image processor, or a torchvision transform.
        tokenizer: A transformers tokenizer, or a callable from texts to the text tower's arguments.
        revision: The checkpoint's revision, for the record.

    Raises:
        UnsupportedModelError: no adapter fits; it says which part did not match.
    """
    architecture, adapter_class = find_adapter(module)
    name = name or type(module).__name__
    structure = share_weights(module)
    adapter = _make_adapter(adapter_class, architecture, module, name)
    try:
        adapter.prepare_model(structure)
        return VisionBridge(
            structure,
            adapter,
            native=module,
            images=_image_processor(processor),
            texts=_text_processor(tokenizer, module),
            revision=revision,
        )
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{name}: the adapter for {architecture} expects a part that this module does not "
            f"have ({error}). CONTRIBUTING.md shows how to add a family."
        ) from error


def load_model(
    name: str,
    *,
    pretrained: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> VisionBridge:
    """Load a vision transformer as a TransformerLens bridge, with its own preprocessing.

    Args:
        name: ``"openai/clip-vit-base-patch32"`` (Hugging Face id), a local folder,
            ``"open_clip:ViT-B-32"``, ``"timm:vit_base_patch14_dinov2.lvd142m"``, or ``"demo"``
            for the small CLIP that comes with this package.
        pretrained: open_clip's tag or file of weights; for timm a local checkpoint file.
        device: Where to put it; the CPU by default.
        dtype: Type of the weights.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: nothing is found under that name, or its kind of model is not supported.
    """
    source, _, rest = name.partition(":")
    loaders = sources()
    if rest and source in loaders:
        model = loaders[source](rest, pretrained, revision)
    else:
        model = _load_transformers(name, revision)
    model.eval()
    if device is not None or dtype != torch.float32:
        model.to(device=device or "cpu", dtype=dtype)
    return model


def sources() -> dict[str, Callable[[str, str | None, str | None], VisionBridge]]:
    """Loaders by the prefix in front of the colon."""
    return {"hf": lambda name, _, revision: _load_transformers(name, revision)}


@cache
def adapters() -> dict[str, Any]:
    """Architecture names to the entry points of their adapters, other packages' included."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def find_adapter(module: nn.Module) -> tuple[str, Any]:
    """Architecture name and adapter class for a module, by its class or the classes it extends.

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
        f"{', '.join(sorted(adapters()))}. CONTRIBUTING.md shows how to add a family."
    )


def share_weights(module: nn.Module) -> nn.Module:
    """A copy of a module's structure whose parameters and buffers are the module's own."""
    shared = {id(t): t for t in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


def _make_adapter(adapter_class: Any, architecture: str, module: nn.Module, name: str) -> Any:
    from transformer_lens.config import TransformerBridgeConfig

    # The adapter reads the true sizes from the module in prepare_model.
    cfg = TransformerBridgeConfig(
        d_model=1, d_head=1, n_layers=1, n_ctx=1, n_heads=1, act_fn="gelu"
    )
    cfg.architecture, cfg.model_name = architecture, name
    parameter = next(module.parameters())
    cfg.device, cfg.dtype = str(parameter.device), parameter.dtype
    return adapter_class(cfg)


def _image_processor(processor: Any) -> ImageProcessor | None:
    if processor is None or hasattr(processor, "fingerprint"):
        return processor  # type: ignore[no-any-return]
    if hasattr(processor, "to_dict"):
        return HuggingFaceImages(processor)
    return TorchvisionImages(processor)


def _text_processor(tokenizer: Any, module: nn.Module) -> TextProcessor | None:
    if tokenizer is None or not hasattr(tokenizer, "pad"):
        return tokenizer  # type: ignore[no-any-return]
    config = getattr(module.config, "text_config", module.config)
    return HuggingFaceTexts(tokenizer, int(config.max_position_embeddings))


def _load_transformers(name: str, revision: str | None) -> VisionBridge:
    from transformers import AutoConfig

    path = _local_folder(name)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, error)) from error
    module = _transformers_module(config, path, revision)
    return wrap(
        module,
        name=name,
        processor=_transformers_images(path, revision),
        tokenizer=_transformers_tokenizer(config, path, revision),
        revision=revision,
    )


def _local_folder(name: str) -> str:
    if name == "demo":
        from vision_plugin.demo import checkpoint_path

        return str(checkpoint_path())
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} is a folder without a config.json, so it holds no Hugging Face checkpoint"
        )
    return str(folder) if folder.is_dir() else name


def _transformers_module(config: Any, path: str, revision: str | None) -> nn.Module:
    import transformers

    wanted = [*(config.architectures or []), _default_architecture(config)]
    for architecture in wanted:
        model_class = getattr(transformers, architecture or "", None)
        if architecture in adapters() and model_class is not None:
            try:
                module: nn.Module = model_class.from_pretrained(path, revision=revision)
            except (OSError, RuntimeError) as error:
                raise ValueError(_not_found(path, error)) from error
            return module
    raise UnsupportedModelError(
        f"{path} holds a {config.architectures or config.model_type}, for which there is no "
        f"adapter. Supported: {', '.join(sorted(adapters()))}. CONTRIBUTING.md shows how to add "
        "a family."
    )


def _default_architecture(config: Any) -> str | None:
    from transformers import AutoModel

    try:
        return str(AutoModel._model_mapping[type(config)].__name__)
    except (KeyError, AttributeError):
        return None


def _transformers_images(path: str, revision: str | None) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        logger.warning("%s comes without preprocessing for pictures (%s)", path, _first(error))
        return None


def _transformers_tokenizer(config: Any, path: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    if not hasattr(config, "text_config"):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        logger.warning("%s comes without a tokenizer (%s)", path, _first(error))
        return None


def _not_found(name: str, error: Exception) -> str:
    return (
        f"could not load a model from {name!r}: it is neither a local folder with a checkpoint "
        f"nor to be had from the hub ({_first(error)}). Offline, give the folder that the "
        "checkpoint was saved to."
    )


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
