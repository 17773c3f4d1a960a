"""A bridge's embeddings of images and texts, and the scores that it gives to pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from vision_plugin.models._decompose import decompose
from vision_plugin.models._decomposition import Decomposition
from vision_plugin.models._modes import in_eval_mode
from vision_plugin.models._processing import ImageProcessor, TextProcessor


class Embeddings:
    """The part of a bridge that embeds images and texts; a base of VisionBridge."""

    adapter: Any
    cfg: Any
    image_processor: ImageProcessor | None
    native: nn.Module
    tokenizer: TextProcessor | None
    __call__: Callable[..., Any]
    _run: Callable[..., Any]

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device: ...
        @property
        def dtype(self) -> torch.dtype: ...

    def preprocess(self, images: Image | Iterable[Any]) -> Float[Tensor, "n channels height width"]:
        """Return pixels in the checkpoint's own size, crop and normalisation.

        Args:
            images: One PIL image, or several.

        Raises:
            ValueError: the model was wrapped without its preprocessing, there is no image, or
                something is not a PIL image.
        """
        if self.image_processor is None:
            raise ValueError(
                f"{self.cfg.model_name} was wrapped without its preprocessing: use "
                "wrap(module, image_processor=...), or pass pixels that you prepared yourself"
            )
        images = check_images(images)
        return self.image_processor(images).to(device=self.device, dtype=self.dtype)

    def encode_image(
        self, input: Tensor, *, normalize: bool = True, **kwargs: Any
    ) -> Float[Tensor, "batch d_embed"]:
        """Return image embeddings in the space shared with text, of norm one by default.

        Args:
            input: Pixels [batch, channels, height, width], or with ``start_at_layer`` a residual
                stream.
            normalize: Scale each row to norm one.
            **kwargs: Further arguments of :meth:`forward`.

        Raises:
            ValueError: the model has no joint space.
        """
        if not self.adapter.has_joint_space:
            raise ValueError(
                f"{self.cfg.model_name} ({self.cfg.architecture}) has no space shared with text; "
                "image_features(pixels) gives its pooled output"
            )
        embedding: Tensor = self(input, **kwargs)
        return nn.functional.normalize(embedding, dim=-1) if normalize else embedding

    def image_features(
        self, input: Tensor, *, normalize: bool = True, **kwargs: Any
    ) -> Float[Tensor, "batch d_pooled"]:
        """Return one vector per image for any model: the joint embedding, or the pooled output."""
        if self.adapter.has_joint_space:
            return self.encode_image(input, normalize=normalize, **kwargs)
        start, size = kwargs.pop("start_at_layer", None), kwargs.pop("image_size", None)
        pooled: Tensor = self.adapter.pooled(self._run(input, start, None, size, kwargs))
        return nn.functional.normalize(pooled, dim=-1) if normalize else pooled

    def decompose(
        self,
        pixels: Tensor,
        *,
        heads: bool = True,
        tokens: bool = True,
        onto: Tensor | None = None,
    ) -> Decomposition:
        """Take image embeddings apart: what each layer, head, token, MLP and bias adds to them.

        The embedding is linear in the residual stream once the last normalisation's statistics are
        held, so every component that writes to the stream has an exact contribution, centred and
        scaled as the whole is (Gandelsman et al. 2024, section 3; their code spreads mean and
        biases evenly over the components, here the biases are parts of their own). Where a head of
        attention pools the tokens, its attention is held, too.

        ``heads`` times ``tokens`` times ``d_embed`` numbers per layer and image are many (300 MB
        for an image of a ViT-L/14): leave out the axes that are not needed, or take inner products
        ``onto`` the texts in question right away.

        Args:
            pixels: Images prepared by :meth:`preprocess`, [batch, channels, height, width].
            heads: Keep the heads apart.
            tokens: Keep the tokens apart that the class token attends to, or that a pool reads.
            onto: Directions such as text embeddings, [c, d_embed]; the parts are then inner
                products with them.

        Returns:
            The parts, of which :meth:`Decomposition.total` equals ``encode_image(pixels,
            normalize=False)``; the pooled vector in a model without a space shared with text.

        Raises:
            UnsupportedModelError: the tower's head is no linear map of the stream, even so.
            ValueError: the pixels are not a batch of numbers, or ``onto`` has another width.
        """
        return decompose(self, pixels, heads=heads, tokens=tokens, onto=onto)

    @torch.no_grad()
    def encode_text(
        self, texts: str | Sequence[str], *, normalize: bool = True, batch_size: int = 256
    ) -> Float[Tensor, "n d_embed"]:
        """Return text embeddings in the joint space, of norm one by default.

        Raises:
            ValueError: the model has no text tower, was wrapped without its tokenizer, or there is
                no text.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self.tokenizer is None:
            raise ValueError(
                f"{self.cfg.model_name} has no tokenizer: load the model from a checkpoint that "
                "has one, or use wrap(module, tokenizer=...)"
            )
        if not texts:
            raise ValueError("texts= is empty: give at least one text to embed")
        parts = []
        with in_eval_mode(self):
            for start in range(0, len(texts), batch_size):
                tokens = self.tokenizer(texts[start : start + batch_size])
                on_device = {name: value.to(self.device) for name, value in tokens.items()}
                parts.append(self.adapter.encode_text(self.native, **on_device))
        embedding = torch.cat(parts)
        return nn.functional.normalize(embedding, dim=-1) if normalize else embedding

    def zero_shot_logits(
        self,
        embedding: Float[Tensor, "n d_embed"],
        text_embeddings: Float[Tensor, "c d_embed"],
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "n c"]:
        """Return ``scale * similarity + bias`` for unit embeddings of images and texts.

        Args:
            embedding: Image embeddings from :meth:`encode_image`.
            text_embeddings: Text embeddings from :meth:`encode_text`.
            scale: Factor on the similarities; None takes the model's own :attr:`logit_scale`.
        """
        scale = self.logit_scale if scale is None else scale
        return scale * (embedding @ text_embeddings.T) + self.logit_bias

    @property
    def logit_scale(self) -> float:
        """Factor on cosine similarities before the softmax (100 in OpenAI's CLIP)."""
        return float(self.adapter.logit_scale(self.native))

    @property
    def logit_bias(self) -> float:
        """Number added to the scaled cosine similarities; 0 unless the model learnt one."""
        return float(self.adapter.logit_bias(self.native))

    @property
    def score_function(self) -> str:
        """Function of the logits in the model's training loss: ``"softmax"`` or ``"sigmoid"``.

        The logits are ``logit_scale * cosine + logit_bias``; the softmax runs over texts.
        """
        return str(self.adapter.score_function)


def check_images(images: object) -> list[Image]:
    """Return images as a list.

    Raises:
        ValueError: there is none, or something is not a PIL image; the message says what and where.
    """
    if isinstance(images, Image):
        return [images]
    if not isinstance(images, Iterable) or isinstance(images, (str, bytes, Mapping)):
        raise ValueError(f"images= must be PIL images, got {_described(images)}: {_HOW_TO_OPEN}")
    every = list(images)
    if not every:
        raise ValueError("images= is empty: give at least one PIL image")
    for place, image in enumerate(every):
        if not isinstance(image, Image):
            raise ValueError(
                f"images= must be PIL images, but number {place} is {_described(image)}: "
                f"{_HOW_TO_OPEN}"
            )
    return every


_HOW_TO_OPEN = "PIL.Image.fromarray(array) and PIL.Image.open(path) make them"


def _described(thing: object) -> str:
    shape = getattr(thing, "shape", None)
    kind = type(thing).__name__
    return f"a {kind}" if shape is None else f"a {kind} of shape {list(shape)}"
