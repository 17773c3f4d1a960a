"""The drawn world's tower as a model without text."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionModel

import vision_plugin as vp
from vision_plugin.demo import checkpoint_path


def tower_of(model: Any) -> Any:
    """Return the same tower, without a projection and a text tower."""
    tower = CLIPVisionModel.from_pretrained(str(checkpoint_path())).eval()
    return vp.wrap(tower, image_processor=model.image_processor)
