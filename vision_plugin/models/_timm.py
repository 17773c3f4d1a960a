"""timm models: listed names, checkpoint files, local folders, hub repositories."""

from __future__ import annotations

from typing import Any

from vision_plugin._paths import local_path
from vision_plugin.models._bridge import VisionBridge
from vision_plugin.models._errors import not_found
from vision_plugin.models._wrapping import wrap


def load_timm(name: str, pretrained: str | None, revision: str | None) -> VisionBridge:
    """Load a timm model with its own preprocessing.

    Args:
        name: A name that timm lists, with its tag (``"vit_base_patch14_dinov2.lvd142m"``), a local
            folder with timm's ``config.json``, or ``"hf-hub:owner/repository"``.
        pretrained: A checkpoint file to load instead of the published weights.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        ValueError: nothing is found under that name.
        UnsupportedModelError: there is no adapter for the model.
    """
    import timm

    if pretrained is not None and not local_path(pretrained).is_file():
        raise ValueError(
            f"pretrained={pretrained!r} is not a file; a timm name carries the tag of its weights, "
            "as in 'timm:vit_base_patch14_dinov2.lvd142m'"
        )
    try:
        model = timm.create_model(
            _source(name, revision),
            pretrained=pretrained is None,
            checkpoint_path=str(local_path(pretrained)) if pretrained else "",
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(not_found(f"timm:{name}", error)) from error
    data: Any = timm.data
    settings = data.resolve_model_data_config(model)
    transform = data.create_transform(**settings, is_training=False)
    return wrap(model, name=f"timm:{name}", image_processor=transform, revision=revision)


def _source(name: str, revision: str | None) -> str:
    folder = local_path(name.removeprefix("local-dir:"))
    if folder.is_dir():
        return f"local-dir:{folder}"
    if revision is None:
        return name
    if not name.startswith(("hf-hub:", "hf_hub:")):
        raise ValueError(
            f"timm's listed names have no revision ({revision!r}): use 'timm:hf-hub:timm/{name}'"
        )
    return f"{name}@{revision}"
