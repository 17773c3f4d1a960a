"""Models that contain a supported vision tower; the bridge wraps the tower."""

from __future__ import annotations


class InnerTower:
    """Path of the tower in a model; ``wrap`` and ``load_model`` then use that module."""

    inner_path: str


class LlavaTower(InnerTower):
    """LLaVA, LLaVA-NeXT and LLaVA-OneVision with their language model's head."""

    inner_path = "model.vision_tower"


class LlavaBaseTower(InnerTower):
    """LLaVA, LLaVA-NeXT and LLaVA-OneVision without the head."""

    inner_path = "vision_tower"


class MAEEncoder(InnerTower):
    """The encoder of a masked autoencoder that still has its decoder."""

    inner_path = "vit"


class TimmTower(InnerTower):
    """A timm model in transformers' wrapper."""

    inner_path = "timm_model"
