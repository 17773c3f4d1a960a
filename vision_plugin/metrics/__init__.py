"""Metrics for sparse autoencoders of vision transformers.

Every metric is a ``torchmetrics.Metric`` that streams, merges and syncs between processes, and
returns a frozen record with ``summary()`` and ``to_dict()``. What each module of this folder names
in its ``__all__`` is public here: ``make exports`` writes the list, ``__init__.pyi``. Importing
this package is quick; torch comes with the first name that needs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
