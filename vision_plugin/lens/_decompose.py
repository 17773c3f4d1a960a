"""``vision-plugin decompose``: what the image embeddings of a model are made of, in one folder.

The parts and their shares, mean ablation, and, with texts, TEXTSPAN of the last layers' heads and
maps of texts over images; for neurons of a layer or latents of an SAE, what later heads make of
them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from vision_plugin._device import check_device
from vision_plugin._disk import whole_folder, write_json
from vision_plugin._inputs import check_template, sentences
from vision_plugin._ours import DECOMPOSITION, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin._rich import Console, Table
from vision_plugin.evaluation import read_concepts
from vision_plugin.formats import load_sae
from vision_plugin.images import label_text, open_images, read_spread
from vision_plugin.lens._ablation import MeanAblation, mean_ablation
from vision_plugin.lens._heads import head_outputs
from vision_plugin.lens._pixels import pixel_batches
from vision_plugin.lens._second_order import SecondOrder, second_order
from vision_plugin.lens._segmentation import text_maps
from vision_plugin.lens._texts import embed_texts
from vision_plugin.lens._textspan import TextSpan
from vision_plugin.models import Decomposition, VisionBridge, load_model
from vision_plugin.models.dictionary import Dictionary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "vision_plugin.decompose/1"
JSON, TABLE = "decomposition.json", "table.txt"
MAPS = 4
"""Images whose maps are drawn."""
Pictures: TypeAlias = tuple[tuple[str, str, Tensor, Tensor], ...]
"""Images with maps: id, text, pixels ``[height, width, 3]``, and the map of the patches."""


@dataclass(frozen=True, kw_only=True)
class DecomposeConfig:
    """A model, images to take apart, and texts to read the parts with.

    Examples:
        >>> vp.lens.DecomposeConfig(model_name="demo", images="demo:8", output_path="parts").layers
        4
    """

    images: str
    """Folder, ``imagefolder:...``, Parquet file, data set name, tar shards, or ``demo:N``."""
    image_column: str | None = None
    """Column that holds the images; name it where a data set has several."""
    split: str | None = None
    """Split of a data set, or of files and folders named for splits; by default the only one."""
    model_name: str
    """Model, as ``vp.load_model`` takes it."""
    device: str = "cpu"
    """Device that the model runs on."""
    output_path: str
    """Folder for the table, the figures and the JSON."""
    texts: str | None = None
    """Texts to read the parts with: a text file, one a line; ``labels`` or ``column:NAME`` of the
    images; or ``demo`` for the factors of drawn images. None looks at shares and cosines alone."""
    template: str = "{}"
    """Sentence around a text, for example ``a picture of {}``."""
    second_order: str | None = None
    """Neurons or latents whose effect through later heads is read: the number of the neurons'
    layer, or an SAE at the residual stream."""
    components: tuple[int, ...] = ()
    """Numbers of these neurons or latents; all by default."""
    n_images: int = 128
    """Number of images, spread evenly over the source."""
    layers: int = 4
    """Last layers whose heads are described by texts."""
    n_texts: int = 5
    """Texts for each head."""
    batch_size: int = 16
    """Images that run at once."""

    def __post_init__(self) -> None:
        check_device(self.device)
        check_template(self.template, argument="template")
        for name in ("n_images", "layers", "n_texts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.components and self.second_order is None:
            raise ValueError("components= are of a layer or an SAE: name it with second_order=")


@dataclass(frozen=True, eq=False)
class Decomposed:
    """Everything that the command finds.

    Attributes:
        config: What was asked for.
        parts: The parts of all images, tokens summed.
        ablation: What is lost without single components and many together.
        spans: TEXTSPAN of the last layers' heads; empty without texts.
        ids: Ids of the images.
        pictures: Images with maps: id, text, the image's pixels, and the map.
        second: Effects of neurons or latents through later heads; None unless they were asked for.
        texts: The texts.
        embedded: Their embeddings; None without texts.

    Examples:
        >>> cfg = vp.lens.DecomposeConfig(
        ...     model_name="demo", images="demo:8", output_path="parts-of-eight"
        ... )
        >>> found = vp.lens.decompose_images(cfg, model=model, progress=False)
        >>> found.parts.n_layers, len(found.ids)
        (4, 8)
    """

    config: DecomposeConfig
    parts: Decomposition
    ablation: MeanAblation
    spans: dict[tuple[int, int], TextSpan]
    ids: tuple[str, ...]
    pictures: Pictures
    second: SecondOrder | None
    texts: tuple[str, ...]
    embedded: Tensor | None

    def tables(self) -> list[Table]:
        """Return the tables: shares, mean ablation, texts of heads, second-order effects."""
        tables = [self.parts.table(), self.ablation.table()]
        if self.spans:
            heads = Table(title="TEXTSPAN, heads in the order in which they matter")
            heads.add_column("head")
            heads.add_column("variance\nexplained", justify="right")
            heads.add_column("texts")
            for layer, head in self.ordered():
                span = self.spans[layer, head]
                last = f"{float(span.explained[-1]):.2f}" if span.texts else ""
                heads.add_row(f"{layer}.{head}", last, ", ".join(span.texts))
            tables.append(heads)
        if self.second is not None:
            tables.append(self.second.table(self.embedded, self.texts))
        return tables

    def ordered(self) -> list[tuple[int, int]]:
        """Return the described heads, those first that a mean replaces worst."""
        every = self.ablation.heads(len(self.ablation.rows))
        return [head for head in every if head in self.spans]

    def plots(self) -> dict[str, Figure]:
        """Return the figures: ``shares``, ``ablation``, and, if any, ``maps``, ``second_order``."""
        figures = {"shares": self.parts.plot(), "ablation": self.ablation.plot()}
        if self.pictures:
            figures["maps"] = _draw_maps(self.pictures)
        if self.second is not None:
            figures["second_order"] = self.second.plot()
        return figures

    def to_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        return {
            "schema": SCHEMA,
            "config": asdict(self.config),
            "ids": list(self.ids),
            "decomposition": self.parts.to_dict(),
            "ablation": self.ablation.to_dict(),
            "heads": [
                {"layer": layer, "head": head, **self.spans[layer, head].to_dict()}
                for layer, head in self.ordered()
            ],
            "second_order": None
            if self.second is None
            else self.second.to_dict(self.embedded, self.texts),
        }

    def save(self, folder: str | Path) -> Path:
        """Write the JSON, the tables and the figures into a folder, all of them or none.

        Raises:
            FileExistsError: the folder holds anything but an earlier decomposition.
        """
        place = local_path(folder)
        with whole_folder(place, replaces=DECOMPOSITION) as made:
            write_json(self.to_dict(), made / JSON)
            (made / TABLE).write_text(_text(self.tables()), encoding="utf-8")
            for name, figure in self.plots().items():
                figure.savefig(made / f"{name}.png", dpi=130)
        return place


def decompose_images(
    cfg: DecomposeConfig,
    *,
    model: VisionBridge | None = None,
    images: Any = None,
    progress: bool = True,
) -> Decomposed:
    """Take images apart, ablate the parts and read them with texts, and write the folder.

    Args:
        cfg: Model, images, texts, and where to write.
        model: A loaded model, in place of ``cfg.model_name``.
        images: An image source, in place of ``cfg.images``.
        progress: Whether to show progress bars.

    Raises:
        ValueError: there are no texts where some are named, or the model has no text tower.
        UnsupportedModelError: the model's head cannot be taken apart.
        FileExistsError: the output folder holds anything but an earlier decomposition.

    Examples:
        >>> cfg = vp.lens.DecomposeConfig(model_name="demo", images="demo:8", output_path="parts")
        >>> found = vp.lens.decompose_images(cfg, model=model, progress=False)
        >>> sorted(found.to_dict())[:3]
        ['ablation', 'config', 'decomposition']
    """
    check_replaceable(local_path(cfg.output_path), DECOMPOSITION)
    named = cfg.images if images is None else images
    source = open_images(named, column=cfg.image_column, split=cfg.split)
    texts = _texts(cfg, source)
    if model is None:
        model = load_model(cfg.model_name, device=cfg.device)
    embedded = None
    if texts:
        spoken = sentences(cfg.template, texts, argument="template")
        embedded = embed_texts(model, spoken)
    followed = _followed(cfg)
    read = read_spread(source, cfg.n_images)
    ids = tuple(source.ids[place] for place in read)
    pixels = model.preprocess(list(read.values()))
    parts = [
        model.decompose(batch, tokens=False)
        for _, batch in pixel_batches(
            model, pixels, batch_size=cfg.batch_size, title="taking apart", progress=progress
        )
    ]
    ablation = mean_ablation(
        model,
        pixels,
        classes=embedded,
        labels=_labels(source, list(read), texts),
        batch_size=cfg.batch_size,
        progress=progress,
    )
    spans: dict[tuple[int, int], TextSpan] = {}
    pictures: Pictures = ()
    if embedded is not None:
        outputs = head_outputs(
            model, pixels, layers=cfg.layers, batch_size=cfg.batch_size, progress=progress
        )
        spans = outputs.textspan(texts, n_texts=cfg.n_texts, embeddings=embedded)
        pictures = _pictures(model, pixels[:MAPS], ids, texts, embedded)
    second = None
    if followed is not None:
        second = second_order(
            model, pixels, followed, which=cfg.components or None, batch_size=cfg.batch_size,
            progress=progress,
        )  # fmt: skip
    found = Decomposed(
        cfg, Decomposition.joined(parts), ablation, spans, ids, pictures, second, tuple(texts),
        embedded,
    )  # fmt: skip
    found.save(cfg.output_path)
    return found


def _followed(cfg: DecomposeConfig) -> int | Dictionary | None:
    """Return the layer or the SAE whose second-order effects are asked for."""
    asked = cfg.second_order
    if asked is None or asked.isdecimal():
        return None if asked is None else int(asked)
    sae: Dictionary = load_sae(asked, device=cfg.device)
    return sae


def _texts(cfg: DecomposeConfig, source: Any) -> list[str]:
    """Return the texts that the configuration names; errors speak of ``texts=``."""
    try:
        return read_concepts(cfg.texts, source)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("concepts", "texts")) from None


def _labels(source: Any, places: Sequence[int], texts: list[str]) -> list[int] | None:
    """Return the place of each image's label among the texts; None unless each has one there."""
    labels = getattr(source, "labels", None)
    if labels is None or not texts:
        return None
    place_of = {text: place for place, text in enumerate(texts)}
    found = [place_of.get(label_text(labels[place]), -1) for place in places]
    return None if -1 in found else found


def _pictures(
    model: VisionBridge, pixels: Tensor, ids: tuple[str, ...], texts: list[str], embedded: Tensor
) -> Pictures:
    """Return the map of each image's nearest text, less the mean map of all texts."""
    nearest = (model.encode_image(pixels).to(embedded) @ embedded.T).argmax(1)
    found = []
    for place, text in enumerate(nearest.tolist()):
        shown = pixels[place : place + 1]
        against = embedded if len(embedded) > 1 else None
        heat = text_maps(model, shown, embedded[text : text + 1], against=against)[0, 0]
        found.append((ids[place], texts[text], _visible(shown[0]), heat.cpu()))
    return tuple(found)


def _visible(pixels: Tensor) -> Tensor:
    """Return pixels stretched to 0..1, ``[height, width, channels]``."""
    low, high = pixels.amin(), pixels.amax()
    return ((pixels - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).float().cpu()


def _draw_maps(pictures: Pictures) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(pictures), 5.2), layout="constrained")
    axes = figure.subplots(2, len(pictures), squeeze=False)
    for column, (id, text, image, heat) in enumerate(pictures):
        above, below = axes[0][column], axes[1][column]
        above.imshow(image.numpy())
        above.set_title(id[-24:], fontsize=7)
        limit = float(heat.abs().max()) or 1.0
        height, width = image.shape[:2]
        below.imshow(image.mean(-1).numpy(), cmap="gray", extent=(0, width, height, 0))
        below.imshow(heat.float().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.65,
                     extent=(0, width, height, 0), interpolation="bilinear")  # fmt: skip
        below.set_title(text[:32], fontsize=8)
        for place in (above, below):
            place.set_axis_off()
    return figure


def _text(tables: Sequence[Table]) -> str:
    out = Console(
        file=io.StringIO(), width=120, color_system=None, markup=False, emoji=False,
        force_jupyter=False,
    )  # fmt: skip
    with out.capture() as captured:
        for table in tables:
            out.print(table)
    return captured.get()
