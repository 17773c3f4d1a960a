"""Loading SAEs of other projects as stock SAELens SAEs: formats, named releases, conversion.

Importing this package is quick; SAELens comes with the first name that needs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
