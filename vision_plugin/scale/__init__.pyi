from ._cluster import ClusterError as ClusterError
from ._engine import RayEngine as RayEngine
from ._lanes import LaneTeam as LaneTeam
from ._train import N_LANES as N_LANES
from ._train import train_in_lanes as train_in_lanes
