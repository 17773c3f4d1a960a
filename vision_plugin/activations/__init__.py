"""Store activations of images on disk, and read them back.

``extract`` runs images through a model into a store, ``ActivationStore`` reads it, ``verify``
checks it and ``info`` says what is in it. SPEC.md beside this file defines the format.
Importing this package is quick: the first name that needs torch and TransformerLens imports them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
