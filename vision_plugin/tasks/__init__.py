"""Find what misleads a model, take it away, and measure what that mends and what it costs.

Importing this package is quick; torch and TransformerLens come with the first name that needs them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
