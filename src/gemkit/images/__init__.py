"""Pictures in: decoded within limits, resized for an image tower. Never imports torch; Pillow is the extra [vision]."""

from gemkit.images.preprocess import preprocess
from gemkit.images.read import LIMITS, Limits, Picture, read

__all__ = ["LIMITS", "Limits", "Picture", "preprocess", "read"]
