"""Models that contain a supported vision tower; the bridge wraps the tower."""

from __future__ import annotations

from typing import Any


class InnerTower:
    """Path of the tower in a model; ``wrap`` and ``load_model`` then use that module."""

    inner_path: str


class LanguageModelTower(InnerTower):
    """A tower whose output a language model reads; ``wrap_vlm`` joins both."""

    joins = True
    """Whether an adapter fits its tower; where not, the refusal names the tower."""
    lens_architecture: str | None = None
    """Architecture whose adapter of TransformerLens fits; None stands for the module's own."""

    @classmethod
    def layers_read(cls, config: Any) -> tuple[int, ...] | None:
        """Return the numbers of the hidden states that the projector reads.

        0 is the embedding and n the output of the n-th block; negative numbers count from the end.
        None stands for the tower's own output, behind its last normalisation.
        """
        del config
        return None

    @classmethod
    def reads_cls(cls, config: Any) -> bool:
        """Return whether the projector reads the class token too."""
        del config
        return True


class LlavaTower(LanguageModelTower):
    """LLaVA, LLaVA-NeXT and LLaVA-OneVision with their language model's head."""

    inner_path = "model.vision_tower"

    @classmethod
    def layers_read(cls, config: Any) -> tuple[int, ...] | None:
        """Return ``vision_feature_layer``."""
        layers = config.vision_feature_layer
        return (layers,) if isinstance(layers, int) else tuple(layers)

    @classmethod
    def reads_cls(cls, config: Any) -> bool:
        """Return whether the strategy is another one than ``"default"``, which drops the token."""
        return bool(config.vision_feature_select_strategy != "default")


class LlavaBaseTower(InnerTower):
    """LLaVA, LLaVA-NeXT and LLaVA-OneVision without the head."""

    inner_path = "vision_tower"


class GemmaTower(LanguageModelTower):
    """Gemma 3 with a SigLIP tower, whose last hidden state it reads."""

    inner_path = "model.vision_tower"


class IdeficsTower(LanguageModelTower):
    """Idefics3 and SmolVLM, which read their tower's last hidden state."""

    inner_path = "model.vision_model"


class SmolTower(IdeficsTower):
    """SmolVLM, whose parts have the names of Idefics3's."""

    lens_architecture = "Idefics3ForConditionalGeneration"


class QwenTower(LanguageModelTower):
    """Qwen2.5-VL and Qwen3-VL, whose towers take images as lists of patches."""

    inner_path = "model.visual"
    joins = False


class MAEEncoder(InnerTower):
    """The encoder of a masked autoencoder that still has its decoder."""

    inner_path = "vit"


class TimmTower(InnerTower):
    """A timm model in transformers' wrapper."""

    inner_path = "timm_model"
