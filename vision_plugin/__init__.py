"""Sparse autoencoders for vision transformers, inside TransformerLens and SAELens.

Importing this package is quick: torch and the hosts are imported by the first attribute that
needs them.
"""

import lazy_loader

from vision_plugin import _hosts

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_hosts.register()
