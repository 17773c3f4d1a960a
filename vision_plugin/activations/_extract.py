"""``extract``: a command that can be killed at any moment and run again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vision_plugin._engines import opened
from vision_plugin._ours import check_parent
from vision_plugin._paths import local_path
from vision_plugin._progress import Progress
from vision_plugin.activations._config import ExtractionConfig
from vision_plugin.activations._decoding import DecodedBatch
from vision_plugin.activations._errors import (
    StoreError,
    StoreMismatchError,
    TooManyBadImagesError,
)
from vision_plugin.activations._files import (
    LOCK,
    STORE_FILE,
    locked,
    read_capped,
    remove_partial,
    to_json,
    whole_file,
)
from vision_plugin.activations._maker import ShardJob, ShardMaker, signed
from vision_plugin.activations._plan import ShardTask, StorePlan
from vision_plugin.activations._records import (
    MANIFEST,
    PLAN,
    BadImage,
    Manifest,
    ShardRecord,
    entry_of,
    read_marker,
    read_plan,
)
from vision_plugin.activations._remote import RemoteFolder, is_url
from vision_plugin.activations._shortening import is_longer, shorten, with_shards_of
from vision_plugin.activations._store import ActivationStore
from vision_plugin.images import ImageSource

logger = logging.getLogger(__name__)


def extract(
    config: ExtractionConfig,
    *,
    model: Any = None,
    images: ImageSource | Any = None,
    engine: Any = None,
) -> ActivationStore:
    """Run images through a model and store the activations at some hook points.

    If it is killed, the same call continues with the missing shards. The store then has the same
    bytes as without the interruption.

    Args:
        config: What to extract, and the folder of the store.
        model: A bridge to use instead of ``config.model_name``.
        images: Anything that ``open_images`` takes, to use instead of ``config.images``.
        engine: Where the shards are made: ``"ray"``, an engine in hand such as
            ``vision_plugin.scale.RayEngine(address="auto")``, or None for this process. The bytes
            of the store are the same. An engine opens the model and the images by name.

    Returns:
        The complete store.

    Raises:
        StoreMismatchError: the folder holds another extraction.
        StoreLockedError: another extraction is writing into the folder.
        StoreFullError: the disk is full; finished shards are kept.
        TooManyBadImagesError: more images than ``config.max_bad_images`` cannot be read.
        ValueError: the model or the images cannot be loaded, or do not fit the configuration.

    Examples:
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo",
        ...     images="demo:8",
        ...     hook_names=[hook],
        ...     output_path="eight-acts",
        ...     tokens="cls",
        ... )
        >>> store = vp.extract(cfg)
        >>> store.activations(hook).shape
        torch.Size([8, 1, 128])
    """
    remote = RemoteFolder(config.output_path) if is_url(config.output_path) else None
    folder = local_path(config.output_path) if remote is None else remote.copies
    if remote is None:
        check_folder(folder)
    elif config.overwrite or config.streaming:
        raise ValueError(
            f"{config.output_path} is in object storage, where nothing is replaced and no stream "
            "is shortened: leave out overwrite= and streaming=, and name another output_path="
        )
    if engine is not None and not (model is None and images is None):
        raise ValueError(
            "an engine opens the model and the images on every machine: leave out model= and "
            "images=, and name them in the configuration"
        )
    with opened(engine) as elsewhere:
        maker = ShardMaker(config, model=model, images=images) if elsewhere is None else None
        plan, probe = elsewhere.plan(config) if maker is None else (maker.plan(), "")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            remove_partial(folder)
            sizes = None if remote is None else remote.pull(folder)
            check_folder(folder)
            if config.images_per_shard is None:
                plan = with_shards_of(folder, plan)
            plan = settle_plan(folder, plan, overwrite=config.overwrite)
            if remote is not None:
                remote.write(PLAN, read_capped(folder, PLAN))
            job = ShardJob(config, plan, probe, folder)
            make = maker.events if maker is not None else partial(_shared, elsewhere, job)
            if remote is not None:
                make = remote.published(make)
            _Extraction(config, plan, folder, make, elsewhere is not None, sizes).run()
            if remote is not None:
                remote.write(MANIFEST, read_capped(folder, MANIFEST))
    return ActivationStore(folder if remote is None else config.output_path)


def _shared(
    engine: Any, job: ShardJob, plan: StorePlan, tasks: Iterable[ShardTask], folder: Path
) -> Generator[ShardRecord, None, None]:
    del plan, folder
    with signed(job.folder) as sign:
        yield from engine.shards(replace(job, sign=sign), list(tasks))


def check_folder(folder: Path) -> None:
    """Raise if a folder contains anything except a store.

    Args:
        folder: Folder of a store; it need not exist.

    Raises:
        StoreError: the path is a file, or the folder contains other things.

    Examples:
        >>> from pathlib import Path
        >>> Path("photos").mkdir()
        >>> _ = Path("photos/one.png").write_bytes(b"a picture")
        >>> try:
        ...     vp.activations.check_folder(Path("photos"))
        ... except vp.activations.StoreError:
        ...     print("it holds other things than a store")
        it holds other things than a store
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file: name a folder for the store")
    if not folder.is_dir():
        check_parent(folder, name="output_path")
        return
    others = [p.name for p in folder.iterdir() if p.name != LOCK and not p.name.startswith(".")]
    # Checked last: another extraction may begin now, and it writes the plan before other files.
    if others and not (folder / PLAN).exists():
        raise StoreError(
            f"{folder} holds other things ({', '.join(sorted(others)[:3])}) and no {PLAN}: name a "
            "new folder for the store"
        )


def settle_plan(folder: Path, plan: StorePlan, *, overwrite: bool = False) -> StorePlan:
    """Write the plan into a new store, or check that the store's plan is the same.

    An incomplete store of a stream may have been planned for more images than the stream has; what
    is there is kept.

    Args:
        folder: Folder of the store, whose lock is held.
        plan: Plan of this extraction.
        overwrite: Whether to remove a store of another plan.

    Raises:
        StoreMismatchError: the plans differ; the message names every difference.
        StoreError: a store is to be removed from a folder that holds something else as well.
    """
    if overwrite and (folder / PLAN).exists():
        there = read_plan(folder)
        if there.differences(plan) and not is_longer(there, plan, folder):
            remove_store(folder)
    if not (folder / PLAN).exists():
        with whole_file(folder / PLAN) as stream:
            stream.write(to_json(plan.to_json()))
        return plan
    there = read_plan(folder)
    if is_longer(there, plan, folder):
        shorten(folder, there, plan)
        return plan
    differences = there.differences(plan)
    if differences:
        raise StoreMismatchError(
            f"{folder} holds another extraction, which this one cannot continue: "
            f"{'; '.join(differences)}. Name another folder, use the same settings, or replace it "
            "with overwrite=True"
        )
    return there


def remove_store(folder: Path) -> None:
    """Remove a store's files, the plan last, so that what a kill leaves is still a store.

    Raises:
        StoreError: the folder holds something that no extraction wrote; nothing is removed then.
    """
    names = sorted(path.name for path in folder.iterdir())
    strangers = [name for name in names if not STORE_FILE.fullmatch(name)]
    if strangers:
        raise StoreError(
            f"{folder} holds {strangers[0]!r}, which no extraction wrote, so the store in it is "
            "left alone: move that elsewhere, or name another output_path="
        )
    for name in [MANIFEST, *(n for n in names if n not in (MANIFEST, PLAN, LOCK)), PLAN]:
        (folder / name).unlink(missing_ok=True)


@dataclass
class _Extraction:
    config: ExtractionConfig
    plan: StorePlan
    folder: Path
    make: Callable[..., Generator[DecodedBatch | ShardRecord, None, None]]
    elsewhere: bool
    """Whether other machines make the shards, so that their batches are not seen here."""
    sizes: dict[str, int] | None = None
    """Sizes of the files in object storage; None for a folder."""
    bad: dict[int, BadImage] = field(default_factory=dict)

    def run(self) -> None:
        """Make the missing shards, then write the manifest."""
        done = finished(self.folder, self.plan, self.sizes)
        for record in done.values():
            self._count(record.bad_images)
        pending = [task for task in self.plan.tasks() if task.index not in done]
        if done and pending:
            logger.info(
                "continuing in %s: %d of %d shards are there",
                *(self.folder, len(done), len(done) + len(pending)),
            )
        n_pending = sum(task.stop - task.start for task in pending)
        with Progress(n_pending, f"extracting to {self.folder}") as progress:
            events = self.make(self.plan, pending, self.folder)
            # Closed before the lock is released, in every case: a shard may still be in writing.
            with closing(events):
                for event in events:
                    if isinstance(event, DecodedBatch):
                        self._count(event.bad)
                        progress.advance(event.task.stop - event.task.start)
                    elif self.elsewhere:
                        self._count(event.bad_images)
                        progress.advance(event.n_images + len(event.bad_images))
        write_manifest(self.folder, self.plan)
        if self.bad:
            logger.warning(
                "%d of %d images could not be read and are not in %s: %s",
                *(len(self.bad), self.plan.n_images, self.folder, self._first_bad()),
            )

    def _count(self, bad: Iterable[BadImage]) -> None:
        self.bad.update({image.index: image for image in bad})
        if len(self.bad) > self.config.max_bad_images:
            raise TooManyBadImagesError(
                f"{len(self.bad)} images cannot be read, more than max_bad_images="
                f"{self.config.max_bad_images} allows: {self._first_bad()}. Mend or remove them, "
                "or raise max_bad_images= and run again"
            )

    def _first_bad(self) -> str:
        first = [f"{bad.id} ({bad.reason})" for bad in list(self.bad.values())[:3]]
        return ", ".join(first) + (", ..." if len(self.bad) > 3 else "")


def finished(
    folder: Path, plan: StorePlan, sizes: dict[str, int] | None = None
) -> dict[int, ShardRecord]:
    """Return the records of complete shards: those with a marker and a file of its size.

    Args:
        folder: Folder of the markers.
        plan: Plan of the store.
        sizes: Sizes of the files where they are not in the folder.
    """
    done = {}
    for task in plan.marked_tasks(folder):
        try:
            record = read_marker(folder, plan, task)
            size = sizes.get(task.file, 0) if sizes is not None else _size(folder / task.file)
        except (StoreError, FileNotFoundError) as error:
            logger.warning("%s will be made again: %s", task.file, error)
            continue
        if size == record.bytes:
            done[task.index] = record
        else:
            logger.warning(
                "%s will be made again: expected %d bytes, found %d", task.file, record.bytes, size
            )
    return done


def _size(path: Path) -> int:
    return path.lstat().st_size


def write_manifest(folder: Path, plan: StorePlan) -> Manifest:
    """Write the manifest of a store whose shards are complete; equal shards give equal bytes.

    Raises:
        StoreError: a shard is missing.
    """
    entries = []
    bad: list[BadImage] = []
    for task in plan.tasks():
        record = read_marker(folder, plan, task)
        entries.append(entry_of(record, read_capped(folder, task.marker)))
        bad += record.bad_images
    manifest = Manifest(plan, tuple(entries), tuple(bad))
    content = to_json(manifest.to_json())
    if not (folder / MANIFEST).is_file() or read_capped(folder, MANIFEST) != content:
        with whole_file(folder / MANIFEST) as stream:
            stream.write(content)
    return manifest
