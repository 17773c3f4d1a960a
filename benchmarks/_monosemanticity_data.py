"""What the monosemanticity benchmark scores: activations, judges and trained SAEs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from sae_lens import BatchTopKTrainingSAEConfig, TrainingSAE
from torch import Tensor

import vision_plugin as vp
from vision_plugin.images import open_images
from vision_plugin.models import Harvester
from vision_plugin.sae import VisionSAERunnerConfig
from vision_plugin.sae._runner import make_sae
from vision_plugin.sae._saving import inference_sae
from vision_plugin.sae._trainer import SteppedTrainer

SHARED = Path(__file__).parents[2] / "shared"


@dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    model_name: str = str(SHARED / "models" / "dinov2-small")
    """The model whose activations the SAEs read."""
    other_model: str = str(SHARED / "models" / "emoji-clip")
    """The model that judges which images are alike."""
    images: str = str(SHARED / "data" / "clipart.parquet")
    """Images."""
    labels: str = "category"
    """Column of the classes that judge which images are alike."""
    layers: tuple[int, ...] = (11,)
    """Blocks behind which to read; fewer images and an SAE of class tokens at the last of them."""
    n_trained: int = 1432
    """Images, drawn at random, to train on."""
    n_scored: int = 848
    """Images to score latents on: as many that were trained on, and as many that were not."""
    fewer: tuple[int, ...] = (200, 400)
    """Smaller numbers of held-out images, for the last layer."""
    d_sae: int = 1536
    """Latents."""
    k: int = 20
    """Latents active per token."""
    training_tokens: int = 1_000_000
    """Vectors that each SAE is trained on."""
    tokens_per_image: int = 40
    """Tokens of an image to train on, drawn at random."""
    batch: int = 1024
    """Vectors per step."""
    lr: float = 6.5e-4
    """Learning rate."""
    threads: int = 2
    """Threads of torch."""
    seed: int = 0
    """Seed of everything random."""
    cache: Path | None = None
    """Folder that keeps activations, embeddings and latents for another run."""
    small: bool = False
    """Shrink everything to a minute; writes no file unless --out is given."""
    out: Path | None = None
    """Folder of the results; benchmarks/results by default."""


@dataclass(frozen=True)
class Data:
    """Images in random order: what the model makes of them, and what judges say."""

    activations: dict[int, np.ndarray]
    """By layer, ``[images, tokens, d_model]`` in half precision, perhaps on disk."""
    judges: dict[str, Tensor]
    """Embeddings by judge."""


@torch.no_grad()
def look_at(cfg: Config) -> Data:
    """Run the images through both models once, or read what an earlier run kept."""
    source = open_images(cfg.images)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    order = order[: cfg.n_trained + cfg.n_scored]
    model, other = vp.load_model(cfg.model_name), vp.load_model(cfg.other_model)
    for each in (model, other):
        each.to(dtype=torch.float32)
    shape = (len(order), model.token_layout().n_tokens, int(model.cfg.d_model))
    activations = {layer: _array(cfg, f"layer-{layer}", shape, "float16") for layer in cfg.layers}
    first = model.image_features(model.preprocess([source[order[0]]]))
    own = _array(cfg, "own", (len(order), first.shape[1]), "float32")
    theirs = other.image_features(other.preprocess([source[order[0]]]))
    outside = _array(cfg, "outside", (len(order), theirs.shape[1]), "float32")
    harvest = Harvester(model, [hook(layer) for layer in cfg.layers])
    for start in track(range(0, len(order), 16), "Running the models", transient=True):
        part = slice(start, min(start + 16, len(order)))
        if own[part].any(axis=1).all():
            continue
        images = [source[index] for index in order[part]]
        pixels = model.preprocess(images)
        for layer, found in zip(cfg.layers, harvest(pixels).values(), strict=True):
            activations[layer][part] = found.half().numpy()
        outside[part] = other.image_features(other.preprocess(images)).numpy()
        own[part] = model.image_features(pixels).numpy()
    names = [str(source.column(cfg.labels)[index]) for index in order]
    number = {name: place for place, name in enumerate(sorted(set(names)))}
    classes = F.one_hot(torch.tensor([number[name] for name in names])).float()
    judges = {
        "the model itself": torch.from_numpy(np.array(own)),
        "another model": torch.from_numpy(np.array(outside)),
        "classes": classes,
    }
    return Data(activations, judges)


def _array(cfg: Config, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Zeros, or what an earlier run wrote to the cache."""
    if cfg.cache is None:
        return np.zeros(shape, dtype)
    path = cfg.cache / f"{name}.npy"
    if not path.exists():
        cfg.cache.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    found = np.lib.format.open_memmap(path, mode="r+")
    if found.shape[0] < shape[0] or found.shape[1:] != shape[1:]:
        raise ValueError(
            f"{path} holds an array of shape {found.shape}, this run needs {shape}: name another "
            "--cache, or remove that file"
        )
    return found[: shape[0]]


def kept(cfg: Config, name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, or what an earlier run kept of it."""
    if cfg.cache is None:
        return make()
    path = cfg.cache / f"{name}.pt"
    if not path.exists():
        cfg.cache.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    return torch.load(path)


def hook(layer: int) -> str:
    """Where a layer is read."""
    return f"blocks.{layer}.hook_resid_post"


class Batches:
    """Rows in random order, again and again."""

    def __init__(self, rows: Tensor, size: int, seed: int) -> None:
        self.rows, self.size = rows, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        chosen = torch.randint(len(self.rows), (self.size,), generator=self.generator)
        return self.rows[chosen]


def train(cfg: Config, rows: Tensor, n_vectors: int) -> Any:
    """A BatchTopK SAE with unit decoder rows and the mean as its bias."""
    run = VisionSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=rows.shape[1], d_sae=cfg.d_sae, k=cfg.k, decoder_init_norm=1.0
        ),
        model_name=cfg.model_name,
        images=cfg.images,
        hook_name=hook(0),
        training_tokens=n_vectors,
        train_batch_size_tokens=cfg.batch,
        lr=cfg.lr,
        dead_feature_window=max(1, n_vectors // cfg.batch // 5),
        seed=cfg.seed,
    )
    sae: TrainingSAE[Any] = make_sae(run)
    with torch.no_grad():
        sae.b_dec.copy_(rows.mean(0))
    batches = Batches(rows, cfg.batch, cfg.seed)
    SteppedTrainer(cfg=run.to_sae_trainer_config(), sae=sae, data_provider=batches).fit()
    return inference_sae(sae)


def training_rows(cfg: Config, activations: np.ndarray, n_images: int) -> Tensor:
    """Some tokens of each image of the first half."""
    generator = np.random.default_rng(cfg.seed)
    n_tokens = activations.shape[1]
    few = min(cfg.tokens_per_image, n_tokens)
    parts = [activations[i][generator.choice(n_tokens, few, False)] for i in range(n_images)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
