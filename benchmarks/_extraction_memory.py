"""One extraction in a process of its own, which tells its peak memory at the end."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import vision_plugin as vp
from vision_plugin.activations import ExtractionConfig, extract
from vision_plugin.images import open_images

HOOK_NAME = "blocks.1.hook_resid_post"


def write_parquet(path: Path, n_images: int) -> None:
    """Small images, a thousand different ones over and over."""
    images = []
    for seed in range(1000):
        values = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(values).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": None})
    rows = {"image": [images[i % 1000] for i in range(n_images)]}
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=1000)


def small_clip() -> vp.VisionBridge:
    """A vision tower that is quick, with 17 tokens of width 64."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=8,
    )
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    module = CLIPVisionModelWithProjection(config).eval()
    return vp.wrap(module, name="small", image_processor=processor)


def main() -> None:
    """Arguments: Parquet file, number of images (0 for none), folder of the store."""
    parquet, n_images, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    watch = MemoryWatch()
    watch.start()
    model = small_clip()
    if n_images:
        config = ExtractionConfig(
            model_name="small",
            images=parquet,
            hook_names=[HOOK_NAME],
            output_path=store,
            batch_size=128,
            images_per_shard=2048,
            n_images=n_images,
            n_workers=1,
        )
        extract(config, model=model, images=open_images(parquet, n_images=n_images))
    watch.stop()
    sys.stdout.write(json.dumps(watch.peaks) + "\n")


class MemoryWatch(threading.Thread):
    """Peak memory of this process and its workers together, looked at ten times a second.

    ``rss`` counts the pages of the image table that are mapped into memory too, which the system
    can drop at any time; ``anonymous`` is what the processes hold themselves. The peak that the
    system keeps (``ru_maxrss``) will not do: a process inherits it from the one that started it.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"peak_anonymous_mb": 0.0, "peak_rss_mb": 0.0}
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopped.wait(0.1):
            self._look()

    def stop(self) -> None:
        """Look a last time."""
        self._stopped.set()
        self.join()
        self._look()

    def _look(self) -> None:
        sums = {"RssAnon": 0.0, "VmRSS": 0.0}
        for process in self._processes():
            try:
                lines = (process / "status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue  # a worker that has just ended
            for line in lines:
                name, _, value = line.partition(":")
                if name in sums:
                    sums[name] += int(value.split()[0]) / 1024
        for key, name in (("peak_anonymous_mb", "RssAnon"), ("peak_rss_mb", "VmRSS")):
            self.peaks[key] = max(self.peaks[key], sums[name])

    @staticmethod
    def _processes() -> list[Path]:
        found, waiting = [], [Path("/proc/self")]
        while waiting:
            process = waiting.pop()
            found.append(process)
            for task in process.glob("task/*/children"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    waiting += [Path("/proc") / pid for pid in task.read_text().split()]
        return found


if __name__ == "__main__":
    main()
