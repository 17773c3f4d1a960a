"""``vision-plugin sparsity``: L0 and fidelity by layer, kind of token and place in the image.

The study of *Steering CLIP's vision transformer with sparse autoencoders* (arXiv 2504.08729): how
many latents of each layer's SAE fire on the CLS token, the registers and the patches, where in the
image they do, and how much of the activation they explain there.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._disk import put_in_place
from vision_plugin.evaluation._evaluate import model_of
from vision_plugin.evaluation._subjects import read_batches
from vision_plugin.formats import load_sae
from vision_plugin.images import open_images
from vision_plugin.metrics import FVU, FVUResult, Sparsity, SparsityResult, l0_map, to_json
from vision_plugin.models import Harvester, VisionBridge, load_model
from vision_plugin.models.dictionary import Dictionary, d_out
from vision_plugin.models.site import Site

SCHEMA = "vision_plugin.sparsity/1"
JSON, PLOT, TABLE = "sparsity.json", "sparsity.png", "sparsity.txt"
FILES = (JSON, PLOT, TABLE)
"""All that a study's folder holds."""
ALL = "all"
"""The row of all selected tokens together, where they are of more than one kind."""
_LEFT_TO_THE_MAP = ("l0_by_kind", "l0_by_position", "frequency", "n_active")

__all__ = [
    "FILES",
    "KindStudy",
    "SAEStudy",
    "SparsityStudy",
    "SparsityStudyConfig",
    "sparsity_study",
    "sparsity_study_with",
    "write_study",
]


@dataclass(frozen=True, kw_only=True)
class SparsityStudyConfig:
    """Which SAEs to study, and on what."""

    saes: tuple[str, ...]
    """Folders of the SAEs, or any checkpoints that ``vp.load_sae`` reads: one or several, at any
    hooks of one model."""
    images: str
    """Folder, ``imagefolder:...``, Parquet file, data set name, tar shards, or ``demo:N``."""
    output_path: str = "sparsity"
    """Folder of the table, the plot and the JSON; an earlier study in it is replaced."""
    model_name: str | None = None
    """The model; by default the one that the SAEs' metadata names."""
    tokens: str | None = None
    """Which tokens to encode: ``cls``, ``register``, ``patch`` or ``all``; by default those that
    each SAE was trained on."""
    dense_above: float = 0.1
    """Share of tokens on which a latent has to fire to be counted as dense."""
    batch_size: int = 64
    """Images per forward pass."""
    image_column: str | None = None
    """Column of images, where a data set has several."""
    split: str | None = None
    """Split of a data set."""
    device: str = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        if not self.saes:
            raise ValueError("name at least one SAE: --saes runs/layer3 runs/layer4")
        if len(set(self.saes)) < len(self.saes):
            raise ValueError(f"saes={list(self.saes)} names one of them twice")
        if self.tokens not in (None, "cls", "register", "patch", "all"):
            raise ValueError(
                f"tokens={self.tokens!r}: use cls, register, patch or all; the kind of a random "
                "token is not known"
            )
        if self.batch_size < 1 or not 0 <= self.dense_above <= 1:
            raise ValueError(
                f"batch_size={self.batch_size} must be at least 1 and "
                f"dense_above={self.dense_above} between 0 and 1"
            )


@dataclass(frozen=True)
class KindStudy:
    """An SAE on one kind of token.

    Attributes:
        kind: ``cls``, ``register``, ``patch``, or ``all`` for the selected tokens together.
        sparsity: L0, dead, rare and dense latents over these tokens alone.
        fidelity: of the reconstruction; the explained variance is around the mean of these tokens.
    """

    kind: str
    sparsity: SparsityResult
    fidelity: FVUResult

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without what there is one of per latent."""
        sparsity = self.sparsity.to_dict().items()
        return {
            "kind": self.kind,
            **{name: value for name, value in sparsity if name not in _LEFT_TO_THE_MAP},
            **self.fidelity.to_dict(),
        }


@dataclass(frozen=True)
class SAEStudy:
    """One SAE on every kind of token that it was given.

    Attributes:
        sae: its path.
        hook_name: where it reads.
        layer: number of the hook's block; None for a hook outside the blocks.
        d_sae: number of latents.
        tokens: which tokens were selected.
        kinds: by kind of token, in the order of the sequence; ``all`` last.
        patch_map: mean L0 at each place of the patch grid; None where patches were not selected.
    """

    sae: str
    hook_name: str
    layer: int | None
    d_sae: int
    tokens: str
    kinds: dict[str, KindStudy]
    patch_map: Float[Tensor, "rows columns"] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "sae": self.sae,
            "hook_name": self.hook_name,
            "layer": self.layer,
            "d_sae": self.d_sae,
            "tokens": self.tokens,
            "kinds": [kind.to_dict() for kind in self.kinds.values()],
            "patch_map": None if self.patch_map is None else self.patch_map.tolist(),
        }


@dataclass(frozen=True)
class SparsityStudy:
    """SAEs of one model side by side, from the first layer to the last."""

    config: SparsityStudyConfig
    model_name: str
    n_images: int
    bad_images: dict[str, str]
    """Why an image was not read, by its id."""
    saes: tuple[SAEStudy, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: everything but what there is one of per latent."""
        found: dict[str, Any] = to_json(
            {
                "schema": SCHEMA,
                "config": asdict(self.config),
                "model_name": self.model_name,
                "n_images": self.n_images,
                "bad_images": self.bad_images,
                "saes": [sae.to_dict() for sae in self.saes],
            }
        )
        return found


def sparsity_study(cfg: SparsityStudyConfig, *, progress: bool = False) -> SparsityStudy:
    """Study SAEs of one model, and write the table, the plot and the JSON.

    Raises:
        ValueError: the SAEs, the model or the images are not there or do not fit together.
        FileExistsError: the output folder holds anything but an earlier study.
    """
    check_replaceable(Path(cfg.output_path).expanduser())
    saes = {path: load_sae(path, device=cfg.device) for path in cfg.saes}
    model = load_model(cfg.model_name or _common_model(saes), device=cfg.device)
    images = open_images(cfg.images, column=cfg.image_column, split=cfg.split)
    result = sparsity_study_with(cfg, model=model, saes=saes, images=images, progress=progress)
    write_study(result, Path(cfg.output_path))
    return result


@torch.no_grad()
def sparsity_study_with(
    cfg: SparsityStudyConfig,
    *,
    model: VisionBridge,
    saes: dict[str, Dictionary],
    images: Any,
    progress: bool = False,
) -> SparsityStudy:
    """:func:`sparsity_study` for a model, SAEs by path and images in hand; writes nothing.

    The model runs once per batch of images, for all SAEs.

    Raises:
        ValueError: an SAE does not fit the model, or no image could be read.
    """
    counters = [_Counter(path, sae, model, cfg) for path, sae in saes.items()]
    names = [name for counter in counters for name in counter.hooks]
    harvester = Harvester(model, list(dict.fromkeys(names)))
    at_once = min(counter.images_at_once(cfg.batch_size) for counter in counters)
    bad: dict[str, str] = {}
    n_images = 0
    for batch in read_batches(images, at_once, bad, progress=progress):
        found = harvester(model.preprocess(list(batch.values())))
        n_images += len(batch)
        for counter in counters:
            counter.update(found)
    if n_images == 0:
        raise ValueError("none of the images could be read")
    found_by_sae = [counter.compute() for counter in counters]
    return SparsityStudy(
        config=cfg,
        model_name=str(model.cfg.model_name),
        n_images=n_images,
        bad_images=bad,
        saes=tuple(sorted(found_by_sae, key=lambda one: -1 if one.layer is None else one.layer)),
    )


class _Counter:
    """One SAE's metrics, a pair for each kind of token."""

    def __init__(
        self, path: str, sae: Dictionary, model: VisionBridge, cfg: SparsityStudyConfig
    ) -> None:
        self.path, self.sae = path, sae
        self.site = site = _site(path, sae, model, cfg.tokens)
        kinds = site.token_kinds
        assert kinds is not None
        self.rows_of = {
            kind: torch.tensor([row for row, own in enumerate(kinds) if own == kind])
            for kind in dict.fromkeys(kinds)
        }
        if len(self.rows_of) > 1:
            self.rows_of[ALL] = torch.arange(len(kinds))
        width = d_out(sae)
        self.metrics = {
            kind: (
                Sparsity(
                    n_features=int(sae.cfg.d_sae),
                    token_kinds=[kinds[row] for row in rows.tolist()],
                    dense_above=cfg.dense_above,
                ).to(model.device),
                FVU(d_in=width).to(model.device),
            )
            for kind, rows in self.rows_of.items()
        }

    @property
    def hooks(self) -> tuple[str, str]:
        """Where the SAE reads, and what it decodes to."""
        return self.site.hook_name, self.site.hook_name_out

    def images_at_once(self, batch_size: int) -> int:
        """Images whose latents fit in memory together."""
        return self.site.images_at_once(int(self.sae.cfg.d_in), batch_size)

    def update(self, found: dict[str, Tensor]) -> None:
        """Add the activations of a batch, by hook."""
        try:
            reading = self.site.read(found)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        latents, target = reading.encode(self.sae), reading.target
        for kind, (sparsity, fidelity) in self.metrics.items():
            rows = self.rows_of[kind].to(target.device)
            sparsity.update(latents.flat(rows))
            fidelity.update(target[:, rows], latents.reconstruction[:, rows])

    def compute(self) -> SAEStudy:
        """What was found on all images."""
        kinds = {
            kind: KindStudy(kind, sparsity.compute(), fidelity.compute())
            for kind, (sparsity, fidelity) in self.metrics.items()
        }
        layer = re.search(r"(?:^|\.)blocks\.(\d+)\.", self.site.hook_name)
        return SAEStudy(
            sae=self.path,
            hook_name=self.site.hook_name,
            layer=int(layer.group(1)) if layer else None,
            d_sae=int(self.sae.cfg.d_sae),
            tokens=self.site.tokens,
            kinds=kinds,
            patch_map=self._patch_map(kinds),
        )

    def _patch_map(self, kinds: dict[str, KindStudy]) -> Tensor | None:
        if "patch" not in kinds:
            return None
        layout = self.site.model.token_layout()
        names = ["patch"] * layout.n_patches
        return l0_map(kinds["patch"].sparsity, names, layout.grid).cpu()


def _site(path: str, sae: Dictionary, model: VisionBridge, tokens: str | None) -> Site:
    """Return where an SAE reads; an error names the SAE."""
    try:
        site = Site.of(model, sae, tokens=tokens)
        model.token_layout().indices(site.tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return site


def _common_model(saes: dict[str, Dictionary]) -> str:
    names = {path: model_of(sae, path) for path, sae in saes.items()}
    first = next(iter(names))
    for path, name in names.items():
        if name != names[first]:
            raise ValueError(
                f"{path} was trained on {name} and {first} on {names[first]}: a study is of one "
                "model, so run one for each, or give --model-name where both are the same"
            )
    return names[first]


def check_replaceable(folder: Path) -> None:
    """Raise FileExistsError where a folder holds anything but an earlier study."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a study needs a folder: give --output-path")
    foreign = sorted({path.name for path in folder.iterdir()} - set(FILES))
    if foreign:
        raise FileExistsError(
            f"{folder} holds {foreign[0]!r}, which no sparsity study wrote, so it is left alone: "
            "give another --output-path"
        )


def write_study(result: SparsityStudy, folder: Path) -> None:
    """Write the JSON, the plot and the table into a folder, all of them or none.

    Raises:
        FileExistsError: the folder holds anything but an earlier study.
    """
    from vision_plugin.evaluation._sparsity_plot import figure_of, text_of

    folder = folder.expanduser().resolve()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        made = Path(aside, "made")
        made.mkdir()
        text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
        (made / JSON).write_text(text, encoding="utf-8")
        (made / TABLE).write_text(text_of(result), encoding="utf-8")
        figure_of(result).savefig(made / PLOT, dpi=150)
        put_in_place(made, folder)
