"""Commands of ours in this process, where everything is imported already."""

from __future__ import annotations

import torch

from vision_plugin.cli import main


def here(*arguments: str) -> None:
    """Run a command to its end on one thread, as the workers of a cluster do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(list(arguments)) == 0
    finally:
        torch.set_num_threads(before)
