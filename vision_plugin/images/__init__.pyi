from ._collection import hash_ids as hash_ids
from ._collection import label_text as label_text
from ._image import BadImageError as BadImageError
from ._image import decode_image as decode_image
from ._open import ImageSource as ImageSource
from ._open import open_images as open_images
from ._reading import read_batches as read_batches
from ._reading import read_spread as read_spread
