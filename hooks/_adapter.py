"""The base of every vision adapter: sizes, the component mapping, token layout, output."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import LinearBridge, MLPBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from vision_plugin.hooks._components import (
    EmbeddingBridge,
    EmbeddingNormBridge,
    GatedMLPBridge,
    LayerScaleBridge,
    PositionEmbeddingBridge,
    VisionAttentionBridge,
    VisionBlockBridge,
    VisionNormBridge,
)
from vision_plugin.hooks._sources import norm_sources, split_sources
from vision_plugin.models import (
    Source,
    TokenLayout,
    UnsupportedModelError,
    component_sources,
)
from vision_plugin.models.readout import Readout


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a vision tower, read from the native module."""

    d_model: int
    n_heads: int
    n_layers: int
    d_mlp: int
    image_size: tuple[int, int]
    """Height and width of the checkpoint's images, in pixels."""
    patch_size: tuple[int, int]
    n_cls: int = 1
    n_registers: int = 0
    eps: float = 1e-5
    act_fn: str = "gelu"
    n_channels: int = 3
    d_head: int | None = None
    """Width of a head; None stands for ``d_model / n_heads``."""
    any_size: bool = False
    """Whether the tower takes images of any size, so that the preprocessing sets the size."""
    pads: bool = False
    """Whether images are padded to whole patches; otherwise what is over at the edge is dropped."""
    rotary: bool = False
    """Whether attention rotates queries and keys by their position."""

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.d_head or self.d_model // self.n_heads

    def layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        """Return the order of the tokens in the residual stream."""
        height, width = image_size or self.image_size
        over = [side - 1 if self.pads else 0 for side in self.patch_size]
        grid = (
            (height + over[0]) // self.patch_size[0],
            (width + over[1]) // self.patch_size[1],
        )
        return TokenLayout(n_cls=self.n_cls, n_registers=self.n_registers, grid=grid)


@dataclass(frozen=True)
class Paths:
    """A family's parts: dotted module paths from the wrapped module.

    The paths from ``ln1`` to ``ln2_post`` start at the block, those from ``q`` to ``o`` at the
    attention, and those named ``mlp_...`` at the MLP. A part that a family lacks is None.
    """

    embed: str
    blocks: str
    attn: str
    q: str
    k: str
    v: str
    o: str
    mlp: str
    mlp_in: str
    mlp_out: str
    mlp_gate: str | None = None
    ln1: str | None = None
    ln1_post: str | None = None
    """LayerScale, or a normalisation, after the attention."""
    ln2: str | None = None
    ln2_post: str | None = None
    """LayerScale, or a normalisation, after the MLP."""
    ln_final: str | None = None
    pos_embed: str | None = None
    embed_ln: str | None = None
    unembed: str | None = None


class VisionArchitectureAdapter(ArchitectureAdapter):
    """Base of the vision adapters; a family defines its sizes and its paths.

    :meth:`prepare_model` makes the component mapping, because it has the module. So the same class
    serves ``vision_plugin.wrap`` and TransformerLens's own loaders, which know only the
    configuration.
    """

    supports_generation = False
    supports_hf_output_attentions = False
    supports_causal_loss = False
    applicable_phases: ClassVar[list[int]] = [1]

    attention: type[VisionAttentionBridge] = VisionAttentionBridge
    embedding: type[EmbeddingBridge] = EmbeddingBridge

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.is_visual_model = True
        cfg.normalization_type = "LN"
        cfg.attention_dir = "bidirectional"
        cfg.final_rms = False
        cfg.gated_mlp = False
        cfg.attn_only = False

    @classmethod
    @abstractmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Return the tower's sizes, read from the native module."""

    @abstractmethod
    def paths(self, module: nn.Module) -> Paths:
        """Return the paths of the native module's parts."""

    def image_output(self, output: Any) -> Tensor:
        """Return the bridge's output tensor from the output of the native forward."""
        logits = getattr(output, "logits", None)
        tensor: Tensor = logits if logits is not None else output.last_hidden_state
        return tensor

    def pooled(self, output: Any) -> Tensor:
        """Return one vector per image, [batch, d], before any projection to a joint space."""
        pooled: Tensor = output.pooler_output
        return pooled

    has_joint_space: bool = False
    """Whether the output's ``logits`` are in a space shared with text."""

    def encode_text(self, module: nn.Module, **tokens: Tensor) -> Tensor:
        """Return text embeddings in the joint space, not normalised, [batch, d_embed]."""
        raise ValueError(
            f"{type(module).__name__} has no text tower. Load a checkpoint that has one "
            "(a CLIPModel, for example) to embed text."
        )

    def logit_scale(self, module: nn.Module) -> float:
        """Return the factor on cosine similarities before the softmax."""
        scale = getattr(module, "logit_scale", None)
        if scale is None:
            raise ValueError(
                f"{type(module).__name__} has no logit scale, because it was loaded without its "
                "text tower."
            )
        return float(scale.detach().exp())

    def logit_bias(self, module: nn.Module) -> float:
        """Return the number added to scaled cosine similarities before the sigmoid, or 0."""
        bias = getattr(module, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Function of the logits in the model's training loss."""

    text_padding: bool | str = True
    """Padding of texts, as an argument of the transformers tokenizers."""

    text_mask: bool = True
    """Whether the text tower takes an attention mask."""

    def restructure(self, module: nn.Module) -> None:
        """Rebuild parts of the bridge's copy of the module that the mapping cannot use as they are.

        Raises:
            UnsupportedModelError: the hooks' names do not describe one of the parts.
        """

    def prepare_model(self, hf_model: nn.Module) -> None:
        """Read the sizes from the module and make the component mapping."""
        dims = self.dimensions(hf_model)
        set_dimensions(self.cfg, dims)
        self.tower_dimensions = dims
        self._sources: dict[str, Source] | None = None
        self.restructure(hf_model)
        self.component_mapping = self.mapping(self.paths(hf_model))

    def mapping(self, paths: Paths) -> dict[str, GeneralizedComponent]:
        """Return TransformerLens's component mapping for a vision transformer."""
        mapping: dict[str, GeneralizedComponent] = {"embed": self.embedding(name=paths.embed)}
        if paths.pos_embed is not None:
            mapping["pos_embed"] = PositionEmbeddingBridge(name=paths.pos_embed)
        if paths.embed_ln is not None:
            mapping["embed_ln"] = EmbeddingNormBridge(
                name=paths.embed_ln, config=self.cfg, use_native_layernorm_autograd=True
            )
        mapping["blocks"] = self.block(paths)
        if paths.ln_final is not None:
            mapping["ln_final"] = self.norm(paths.ln_final)
        if paths.unembed is not None:
            mapping["unembed"] = LinearBridge(name=paths.unembed)
        return mapping

    def block(self, paths: Paths) -> VisionBlockBridge:
        """Return one block of the mapping; TransformerLens copies it for every layer."""
        parts: dict[str, GeneralizedComponent] = {}
        if paths.ln1 is not None:
            parts["ln1"] = self.norm(paths.ln1)
        parts["attn"] = self.attention(
            name=paths.attn,
            config=self.cfg,
            is_causal=False,
            submodules={
                "q": LinearBridge(name=paths.q),
                "k": LinearBridge(name=paths.k),
                "v": LinearBridge(name=paths.v),
                "o": LinearBridge(name=paths.o),
            },
        )
        if paths.ln1_post is not None:
            parts["ln1_post"] = LayerScaleBridge(name=paths.ln1_post)
        if paths.ln2 is not None:
            parts["ln2"] = self.norm(paths.ln2)
        parts["mlp"] = self.mlp(paths)
        if paths.ln2_post is not None:
            parts["ln2_post"] = LayerScaleBridge(name=paths.ln2_post)
        overrides = None if paths.ln2 is not None else {"hook_resid_mid": "mlp.hook_in"}
        return VisionBlockBridge(
            name=paths.blocks, submodules=parts, hook_alias_overrides=overrides
        )

    def mlp(self, paths: Paths) -> MLPBridge:
        """Return the MLP of a block, with its gate if it has one."""
        self.cfg.gated_mlp = paths.mlp_gate is not None
        parts: dict[str, GeneralizedComponent] = {
            "in": LinearBridge(name=paths.mlp_in),
            "out": LinearBridge(name=paths.mlp_out),
        }
        if paths.mlp_gate is None:
            return MLPBridge(name=paths.mlp, config=self.cfg, submodules=parts)
        parts["gate"] = LinearBridge(name=paths.mlp_gate)
        return GatedMLPBridge(name=paths.mlp, config=self.cfg, submodules=parts)

    def norm(self, path: str) -> VisionNormBridge:
        """Return a normalisation that keeps the native arithmetic."""
        return VisionNormBridge(name=path, config=self.cfg, use_native_layernorm_autograd=True)

    def readout(self, model: Any) -> Readout:
        """Return the way from the last residual stream to the image's one vector.

        The default is the class token, the last normalisation, and the joint projection if there
        is one.

        Args:
            model: The VisionBridge.

        Raises:
            UnsupportedModelError: the vector is no linear map of the stream, even with
                normalisations and attention held.
        """
        if self.tower_dimensions.n_cls == 0:
            raise UnsupportedModelError(
                f"{model.cfg.model_name} has no class token, and its adapter does not say what it "
                "reads in place of one: override readout() in the adapter"
            )
        projection = component(model, "unembed") if self.has_joint_space else None
        return Readout(
            norm=component(model, "ln_final"),
            projections=() if projection is None else (projection,),
        )

    # ------------------------------------------------------------------ harvesting

    def native_forward(self, module: nn.Module, pixels: Tensor) -> Any:
        """Run the vision part of an untouched native module."""
        return module(pixel_values=pixels)

    def native_path(self, path: str) -> str:
        """Return the native module's path of what :meth:`restructure` moved to ``path``."""
        return path

    def harvest_sources(self, model: Any) -> dict[str, Source]:
        """Return the native module's source of each hook point's tensor, by canonical name."""
        if self._sources is None:
            self._sources = self.find_sources(model)
        return self._sources

    def find_sources(self, model: Any) -> dict[str, Source]:
        """Return the sources that :meth:`harvest_sources` caches; families add their own here."""
        native = {path for path, _ in model.native.named_modules()}
        sources: dict[str, Source] = {}
        for name, source in component_sources(model).items():
            path = self.native_path(source.path)
            if path in native:
                sources[name] = replace(source, path=path)
        sources.update(norm_sources(model.original_model, self.native_path))
        sources.update(split_sources(model.original_model, self.native_path))
        return sources


def component(model: Any, name: str) -> Any:
    """Return the native module of a bridge's part, or None without such a part."""
    return getattr(getattr(model, name, None), "original_component", None)


def set_dimensions(cfg: TransformerBridgeConfig, dims: Dimensions) -> None:
    """Write a tower's sizes into a bridge configuration."""
    cfg.d_model = dims.d_model
    cfg.n_heads = dims.n_heads
    cfg.d_head = dims.head_width
    cfg.n_layers = dims.n_layers
    cfg.d_mlp = dims.d_mlp
    cfg.n_ctx = dims.layout().n_tokens
    cfg.eps = dims.eps
    cfg.act_fn = dims.act_fn
    cfg.positional_embedding_type = "rotary" if dims.rotary else "standard"
