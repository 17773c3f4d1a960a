"""Activations of images, to disk and back.

``extract`` runs images through a model into a store, ``ActivationStore`` reads it, ``verify``
and ``info`` tell whether it is sound and what is in it. SPEC.md beside this file is the format.
Importing this package is quick; torch and TransformerLens come with the first name that needs them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
