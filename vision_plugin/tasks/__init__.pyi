from ._find import RULES as RULES
from ._find import find_latents as find_latents
from ._found import FoundLatents as FoundLatents
