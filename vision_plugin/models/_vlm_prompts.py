"""Images and prompts as the tensors of a vision-language model, by its own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor

from vision_plugin.models._embeddings import check_images
from vision_plugin.models._rgb import as_rgb

Images = Image | Sequence[Image] | Sequence[Sequence[Image]]
"""One image; one per prompt; or a list of images for each prompt."""


def prepare(processor: Any, images: Any, prompt: str | Sequence[str], *, name: str) -> Any:
    """Return a processor's tensors for images and prompts, padded on the left.

    Args:
        processor: A transformers processor.
        images: See ``Images``.
        prompt: One prompt for all, or one for each image (or list of images). A prompt with image
            tokens is taken as it is; any other one is put into the processor's chat template, its
            images first.
        name: Name of the model in errors.

    Raises:
        ValueError: images and prompts do not fit together, or there is no place for an image.
    """
    groups = grouped(images)
    prompts = [prompt] * len(groups) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(groups):
        raise ValueError(
            f"{len(prompts)} prompts come with {len(groups)} images: give one prompt for all, or "
            "one for each"
        )
    token = placeholder(processor)
    texts = [
        _placed(processor, text, len(group), token, name)
        for text, group in zip(prompts, groups, strict=True)
    ]
    start = getattr(processor.tokenizer, "bos_token", None)
    return processor(
        text=texts,
        images=[[as_rgb(image) for image in group] for group in groups],
        padding=True,
        padding_side="left",
        # A template may write the start itself; twice is not what the model was trained on.
        add_special_tokens=not (start and texts[0].startswith(start)),
        return_tensors="pt",
    )


def grouped(images: Any) -> list[list[Image]]:
    """Return the images of each prompt.

    Raises:
        ValueError: there is none, or something is not a PIL image.
    """
    if isinstance(images, (Sequence, tuple)) and not isinstance(images, (str, bytes, Image)):
        nested = [isinstance(group, (list, tuple)) for group in images]
        if images and all(nested):
            return [check_images(group) for group in images]
        if any(nested):
            raise ValueError(
                "images= mixes images and lists of images: give one image per prompt, or a list of "
                "images for each"
            )
    return [[image] for image in check_images(images)]


def placeholder(processor: Any) -> str:
    """Return the text that stands for an image in a prompt."""
    return str(getattr(processor, "boi_token", None) or processor.image_token)


def _placed(processor: Any, text: str, n_images: int, token: str, name: str) -> str:
    found = text.count(token)
    if found == n_images:
        return text
    if found:
        raise ValueError(
            f"the prompt {_short(text)} has {found} image tokens ({token}) and comes with "
            f"{n_images} image{'s' if n_images > 1 else ''}: write one token per image, and give "
            "the images of one prompt as a list in the list, [[first, second]]"
        )
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"the prompt {_short(text)} has no image token, and {name} has no chat template that "
            f"would put one: write {token} where the image belongs"
        )
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
    conversation = [{"role": "user", "content": content}]
    placed: str = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    return placed


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def check_inputs(inputs: Mapping[str, Any], name: str, image_token: int | None) -> None:
    """Raise ValueError unless a mapping holds what a processor returns.

    Args:
        inputs: The mapping.
        name: Name of the model in errors.
        image_token: Number of the token that stands for an image; None checks none.
    """
    missing = [key for key in ("input_ids", "pixel_values") if key not in inputs]
    if missing or not isinstance(inputs["input_ids"], Tensor):
        raise ValueError(
            f"inputs of {name} need input_ids and pixel_values"
            f"{f', but {missing[0]} is missing' if missing else ''}: "
            "vlm.prepare(images, prompt) makes them"
        )
    if image_token is not None and not bool((inputs["input_ids"] == image_token).any()):
        raise ValueError(
            f"the input_ids for {name} hold no image token ({image_token}), so it would see no "
            "image: vlm.prepare(images, prompt) puts the tokens in"
        )


def batches_of(
    images: Any, prompt: str | Sequence[str] | None, batch_size: int
) -> list[tuple[Any, str | Sequence[str] | None]]:
    """Return images with their prompts in batches.

    Raises:
        ValueError: the batches would be empty.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: use 1 or more")
    if not isinstance(images, (list, tuple)) or len(images) <= batch_size:
        return [(images, prompt)]
    if prompt is not None and not isinstance(prompt, str) and len(prompt) != len(images):
        return [(images, prompt)]  # ``prepare`` says what is wrong
    starts = range(0, len(images), batch_size)
    stop = [start + batch_size for start in starts]
    return [
        (images[a:b], prompt if prompt is None or isinstance(prompt, str) else prompt[a:b])
        for a, b in zip(starts, stop, strict=True)
    ]
