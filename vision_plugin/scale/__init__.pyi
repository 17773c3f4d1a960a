from ._cluster import ClusterError as ClusterError
from ._engine import RayEngine as RayEngine
from ._lanes import LaneTeam as LaneTeam
from ._latents import LatentTeam as LatentTeam
from ._train import N_LANES as N_LANES
from ._train import train_in_lanes as train_in_lanes
from ._train import train_by_latents as train_by_latents
