"""Vision transformers as TransformerLens bridges.

Importing this package is quick: the first name that needs torch and TransformerLens imports them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
