"""Where images come from and how they are decoded: folders, Parquet files, data sets, tar shards.

Importing this package is quick; a source's library comes with the first source that needs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
