"""Past one machine: the same plans on a Ray cluster, and one SAE over several processes.

``RayEngine`` runs the shards of an extraction, the groups of a sweep and the ranges of an
evaluation as plain Ray tasks. Ray is the extra ``[ray]``, and this folder alone knows it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
