"""Many SAEs on a cluster: each group that shares a pass over the images is a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE

from vision_plugin._disk import write_json
from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_json
from vision_plugin.sae import VisionSAERunnerConfig, streams
from vision_plugin.scale._cluster import ClusterError
from vision_plugin.scale._spread import Slot, spread
from vision_plugin.scale._versions import Home

MARKER = "group.json"
"""Name of the file that says that a group is done, and what it was."""
SCHEMA = "vision_plugin.group/1"


@dataclass(frozen=True)
class GroupWork:
    """SAEs that share a pass, and the folder of their folders."""

    cfgs: Mapping[str, Any]
    folder: str
    home: Home

    def __hash__(self) -> int:
        return hash(self.folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupWork) and other.folder == self.folder

    def __str__(self) -> str:
        return f"of {self.folder}"


def train_groups(
    ray: Any, slot: Slot, cfgs: Mapping[str, VisionSAERunnerConfig], output_path: str | None
) -> dict[str, Any]:
    """Train SAEs on a cluster; what is finished already is not trained again.

    A group of its own goes to ``output_path``; several go to its folders ``group-1``, ``group-2``
    and so on, in the order in which their first SAEs are named.

    Args:
        ray: The connected module.
        slot: What a group occupies.
        cfgs: Configurations by the SAE's name.
        output_path: Folder on a disk that all machines share.

    Returns:
        The SAEs by name, read from their folders.

    Raises:
        ValueError: there is no folder or no SAE, or what a worker raises.
        ClusterError: the machines do not share the folder.
    """
    if output_path is None or not cfgs:
        raise ValueError("SAEs trained on a cluster need names and a folder: set output_path=")
    out = local_path(output_path).resolve()
    groups, home = streams(cfgs), Home()
    many = len(groups) > 1
    works = [
        GroupWork(group, str(out / f"group-{number}" if many else out), home)
        for number, group in enumerate(groups, 1)
    ]
    for work, _ in spread(ray, train_group, works, slot, twice=False):
        if not _is_done(work):
            raise ClusterError(
                f"the machines do not share {work.folder}: put output_path= on a disk that all of "
                "them see"
            )
    return {
        name: SAE.load_from_disk(str(Path(work.folder) / name))
        for work in works
        for name in work.cfgs
    }


def train_group(work: GroupWork) -> None:
    """Train the SAEs of a group, from their last checkpoint; do nothing where they are done."""
    work.home.settle()
    if _is_done(work):
        return
    from vision_plugin.sae import VisionMultiSAETrainingRunner

    VisionMultiSAETrainingRunner(work.cfgs, output_path=work.folder).run()
    write_json({"schema": SCHEMA, "sha256": _hash(work)}, Path(work.folder) / MARKER)


def _hash(work: GroupWork) -> str:
    identity = {name: cfg.identity() for name, cfg in work.cfgs.items()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _is_done(work: GroupWork) -> bool:
    marker = Path(work.folder) / MARKER
    if not marker.is_file():
        return False
    found = read_json(marker)
    return isinstance(found, dict) and found.get("sha256") == _hash(work)
