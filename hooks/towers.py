"""Models that carry a supported vision tower inside: what is wrapped is the tower."""

from __future__ import annotations


class InnerTower:
    """Says where the tower is; ``wrap`` and ``load_model`` go on with that module."""

    inner_path: str


class LlavaTower(InnerTower):
    """LLaVA, LLaVA-NeXT, LLaVA-OneVision with their language model's head."""

    inner_path = "model.vision_tower"


class LlavaBaseTower(InnerTower):
    """The same without the head."""

    inner_path = "vision_tower"


class MAEEncoder(InnerTower):
    """The encoder of a masked autoencoder that still has its decoder."""

    inner_path = "vit"


class TimmTower(InnerTower):
    """A timm model in transformers' wrapper."""

    inner_path = "timm_model"
