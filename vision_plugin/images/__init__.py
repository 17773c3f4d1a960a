"""Open and decode images: folders, Parquet files, data sets, tar shards.

Importing this package is quick: the first source that needs a library imports it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
