"""Sparse autoencoders: trained by SAELens's trainer, saved in SAELens's format.

Importing this package is quick; torch and the hosts come with the first name that needs them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
