"""Say what features mean and what a model's embedding is made of: names, decompositions, lenses.

Importing this package is quick; torch and TransformerLens come with the first name that needs them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
