"""Checkpoints of Hugging Face transformers, from the hub or a local folder."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from torch import nn

from vision_plugin._paths import local_path
from vision_plugin.models._bridge import VisionBridge
from vision_plugin.models._errors import HOW_TO_ADD, UnsupportedModelError, not_found
from vision_plugin.models._wrapping import adapters, inner_tower, wrap

logger = logging.getLogger(__name__)


def load_transformers(name: str, pretrained: str | None, revision: str | None) -> VisionBridge:
    """Load a checkpoint with its own preprocessing and tokenizer.

    Args:
        name: Hugging Face id, local folder, or ``"demo"``.
        pretrained: None; a transformers checkpoint brings its own weights.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: nothing is found under that name, or ``pretrained`` is given.
        UnsupportedModelError: there is no adapter for the model.
    """
    from transformers import AutoConfig

    if pretrained is not None:
        raise ValueError(
            f"pretrained={pretrained!r} does not apply to {name!r}: a transformers checkpoint "
            "brings its own weights. Use it with 'open_clip:...' or 'timm:...'"
        )
    if name == "demo":
        path = str(import_module("vision_plugin.demo").checkpoint_path())
    else:
        path = local_checkpoint(name)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(not_found(name, error)) from error
    module = _module(config, path, revision)
    return wrap(
        module,
        name=name,
        image_processor=_images(path, revision),
        tokenizer=_tokenizer(module, path, revision),
        revision=revision,
    )


def local_checkpoint(name: str) -> str:
    """Return the folder of a checkpoint, or the name where it stands for one on the hub.

    Raises:
        ValueError: there is such a file, or a folder that holds no checkpoint.
    """
    folder = local_path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{name} is no folder, so it holds no Hugging Face checkpoint: name the folder that it "
            "was saved to"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} is a folder without a config.json, so it holds no Hugging Face checkpoint"
        )
    return str(folder) if folder.is_dir() else name


def _module(config: Any, path: str, revision: str | None) -> nn.Module:
    import transformers

    wanted = [*(config.architectures or []), _default_architecture(config)]
    for architecture in wanted:
        model_class = getattr(transformers, architecture or "", None)
        if architecture not in adapters() or model_class is None:
            continue
        tower = inner_tower(adapters()[architecture].load())
        try:
            if tower is not None and hasattr(config, "vision_config"):
                return _tower_alone(config, path, revision, tower.rpartition(".")[2])
            module: nn.Module = model_class.from_pretrained(path, revision=revision)
        except (OSError, RuntimeError) as error:
            raise ValueError(not_found(path, error)) from error
        return module
    raise UnsupportedModelError(
        f"{path} holds a {config.architectures or config.model_type}, for which there is no "
        f"adapter. Supported: {', '.join(sorted(adapters()))}. {HOW_TO_ADD}."
    )


def _tower_alone(config: Any, path: str, revision: str | None, part: str) -> nn.Module:
    """Load the vision tower of a multimodal checkpoint, a part of it, without the rest."""
    import transformers

    architecture = _default_architecture(config.vision_config)
    if architecture not in adapters():
        raise UnsupportedModelError(
            f"{path}: its vision tower is a {architecture or config.vision_config.model_type}, for "
            f"which there is no adapter. {HOW_TO_ADD}."
        )
    tower_class = getattr(transformers, architecture)
    module, found = tower_class.from_pretrained(
        path,
        config=config.vision_config,
        revision=revision,
        key_mapping={rf"^(model\.)?{part}\.(vision_model\.)?": ""},
        output_loading_info=True,
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{path}: the checkpoint has no weights for {len(missing)} parts of its vision tower "
            f"({', '.join(missing[:3])}, ...)"
        )
    tower: nn.Module = module
    return tower


def _default_architecture(config: Any) -> str | None:
    from transformers import AutoModel

    try:
        model_class: Any = AutoModel._model_mapping[type(config)]
        return str(model_class.__name__)
    except (KeyError, AttributeError):
        return None


def _images(path: str, revision: str | None) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        logger.warning("%s has no preprocessing for images (%s)", path, error)
        return None


def _tokenizer(module: Any, path: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    if not hasattr(module.config, "text_config"):
        return None  # a tower alone, or a model without text
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        logger.warning("%s has no tokenizer (%s)", path, error)
        return None
