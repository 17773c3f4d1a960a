"""What has to be the same on every machine of a cluster: the versions of some packages."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vision_plugin._version import __version__
from vision_plugin.scale._cluster import ClusterError

_PACKAGES = ("torch", "sae-lens", "transformers", "pillow", "numpy")
_VARIABLES = (
    *("MKL_CBWR", "HF_HUB_OFFLINE", "HF_HOME", "VISION_PLUGIN_DEBUG"),
    *("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
)


def versions() -> dict[str, str]:
    """Return the versions in this process, by package."""
    return dict(_versions())


@cache  # each worker compares them before each task, and reading them takes a while
def _versions() -> dict[str, str]:
    found = {"vision-plugin": __version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


@dataclass(frozen=True)
class Home:
    """The process that asked for the work: its packages and its settings."""

    versions: dict[str, str] = field(default_factory=versions)
    variables: dict[str, str] = field(
        default_factory=lambda: {n: os.environ[n] for n in _VARIABLES if n in os.environ}
    )

    folder: str = field(default_factory=os.getcwd)
    """Folder that paths begin from, on machines that have it too."""

    def settle(self) -> None:
        """Make this process work as the one that asked; call it before torch is imported.

        Raises:
            ClusterError: a package has another version here.
        """
        here = versions()
        others = [
            f"{name} {here.get(name)} there, {wanted} here"
            for name, wanted in self.versions.items()
            if here.get(name) != wanted
        ]
        if others:
            raise ClusterError(
                f"{socket.gethostname()} has other versions than this machine ({'; '.join(others)})"
                ": install the same on every machine of the cluster"
            )
        os.environ.update(self.variables)
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
