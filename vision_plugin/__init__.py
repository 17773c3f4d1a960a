"""Sparse autoencoders for vision transformers, inside TransformerLens and SAELens.

Importing this package is quick: torch and the hosts are imported by the first attribute that
needs them.
"""

from importlib import import_module
from typing import Any

import lazy_loader

from vision_plugin import _hosts
from vision_plugin._version import __version__ as __version__

_get, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    # The package itself is callable: an attribute and an import must give the same object.
    return import_module("vision_plugin.report") if name == "report" else _get(name)


_hosts.register()
