"""Keep the complete shards of a stream that ends before the number of images that was planned."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vision_plugin.activations._errors import StoreError
from vision_plugin.activations._files import to_json, whole_file
from vision_plugin.activations._plan import ShardTask, StorePlan
from vision_plugin.activations._records import MANIFEST, PLAN, read_marker, read_plan
from vision_plugin.activations._shards import Shard, complete_shard

logger = logging.getLogger(__name__)

_OF_LENGTH = ("images.n_images: ", "images.ids_sha256: ")


def is_longer(there: StorePlan, plan: StorePlan, folder: Path) -> bool:
    """Whether an incomplete store is that of the same stream, with more images than there are.

    The images of a stream are numbered from its front, so the first are the same in both.
    """
    return (
        there.images.get("kind") == plan.images["kind"] == "stream"
        and there.n_images > plan.n_images
        and all(text.startswith(_OF_LENGTH) for text in there.differences(plan))
        and not (folder / MANIFEST).exists()
    )


def with_shards_of(folder: Path, plan: StorePlan) -> StorePlan:
    """Return a plan with the shards of a longer one in its folder, where it could shorten that.

    Where nobody says how many images a shard has, it depends on the number of images.
    """
    if not (folder / PLAN).exists():
        return plan
    there = read_plan(folder)
    sized = replace(plan, images_per_shard=there.images_per_shard)
    return sized if is_longer(there, sized, folder) else plan


def shorten(folder: Path, there: StorePlan, plan: StorePlan) -> None:
    """Make shards of a longer plan shards of a shorter one, and then replace the plan.

    A shard and its marker carry their plan's hash, so both are written anew; nothing is computed
    again. The plan comes last: whatever a kill leaves is shortened when this runs again.

    Args:
        folder: Folder of the store, whose lock is held.
        there: The plan in the folder.
        plan: The same plan with fewer images.

    Raises:
        StoreFullError: there is no room for a copy of a shard.
    """
    kept = 0
    for task in there.marked_tasks(folder):
        if task.index < plan.n_shards and plan.task(task.index) == task:
            kept += _rewritten(folder, there, plan, task)
        else:
            (folder / task.marker).unlink()
            (folder / task.file).unlink(missing_ok=True)
    with whole_file(folder / PLAN) as stream:
        stream.write(to_json(plan.to_json()))
    logger.info(
        "%s was planned for %d images and has %d now: %d shards are kept",
        *(folder, there.n_images, plan.n_images, kept),
    )


def _rewritten(folder: Path, there: StorePlan, plan: StorePlan, task: ShardTask) -> bool:
    """Write one shard under the new plan; a damaged one is left to be made again."""
    with suppress(StoreError):  # where it is of the longer plan, as most are
        read_marker(folder, plan, task)
        return True
    try:
        shard = Shard(folder, there, task)
        record = shard.record
        images = range(record.n_images)
        tensors = {name: shard.tensor(name, images) for name in record.checksums}
    except (StoreError, FileNotFoundError) as error:
        logger.warning("%s will be made again: %s", task.file, error)
        return False
    complete_shard(
        *(folder, plan, task, tensors),
        ids=record.ids,
        labels=record.labels,
        bad=record.bad_images,
    )
    return True
