"""Read a model in eval mode, whatever mode its owner left it in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


class Modes:
    """The modes of a bridge's modules while somebody reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_readers = 0
        self._training: list[nn.Module] = []
        self._has_said = False

    def begin(self, model: Any) -> None:
        """Put every part that is in train mode in eval mode; the first reader does it."""
        with self._lock:
            self._n_readers += 1
            if self._n_readers > 1:
                return
            parts = chain(model.native.modules(), model.original_model.modules(), model.modules())
            self._training = [part for part in dict.fromkeys(parts) if part.training]
            if not self._training:
                return
            _set(self._training, training=False)
            if not self._has_said:
                self._has_said = True
                logger.warning(
                    "%s is in train mode, in which two readings differ (dropout): it is read in "
                    "eval mode and put back afterwards",
                    model.cfg.model_name,
                )

    def end(self) -> None:
        """Restore the modes; the last reader does it."""
        with self._lock:
            self._n_readers -= 1
            if self._n_readers == 0:
                _set(self._training, training=True)
                self._training = []


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Run a model in eval mode within a ``with`` block, and restore the mode of each part.

    Whatever reads a model for a result does it in here: harvesting, edited passes, embeddings.
    """
    modes: Modes = model.modes
    modes.begin(model)
    try:
        yield
    finally:
        modes.end()


def _set(modules: list[nn.Module], *, training: bool) -> None:
    # Not module.train(): some classes do more than set the mode there, as merging adapters.
    for module in modules:
        module.training = training
