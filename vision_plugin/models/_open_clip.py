"""open_clip models: built-in names, local folders, hub repositories."""

from __future__ import annotations

from vision_plugin._paths import local_path
from vision_plugin.models._bridge import VisionBridge
from vision_plugin.models._errors import not_found
from vision_plugin.models._wrapping import wrap


def load_open_clip(name: str, pretrained: str | None, revision: str | None) -> VisionBridge:
    """Load an open_clip model with its own preprocessing and tokenizer.

    Args:
        name: A name that open_clip lists (``"ViT-B-32"``), a local folder with
            ``open_clip_config.json``, or ``"hf-hub:owner/repository"``.
        pretrained: Tag or file of weights, needed with a name that open_clip lists.
        revision: None; open_clip cannot load revisions.

    Raises:
        ValueError: nothing is found, or ``pretrained`` is missing.
        UnsupportedModelError: there is no adapter for the image tower.
    """
    import open_clip

    if revision is not None:
        raise ValueError(f"open_clip cannot load revision={revision!r}: leave revision= out")
    source = _source(name)
    if pretrained and local_path(pretrained).is_file():
        pretrained = str(local_path(pretrained))
    if ":" not in source and not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(source)
        raise ValueError(
            f"open_clip:{name} does not say which weights to load: give pretrained=, one of "
            f"{', '.join(tags) or '(none published)'} or a file"
        )
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            source, pretrained=pretrained, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(not_found(f"open_clip:{name}", error)) from error
    return wrap(model, name=f"open_clip:{name}", image_processor=transform, tokenizer=tokenizer)


def _source(name: str) -> str:
    folder = local_path(name.removeprefix("local-dir:"))
    return f"local-dir:{folder}" if folder.is_dir() else name
