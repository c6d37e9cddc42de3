"""Pictures, and what is found in them. Never imports torch; Pillow is the extra [vision].

read.py        a picture from wherever it is, decoded within limits
preprocess.py  to what an image tower takes
masks.py       a mask of a thing, between its place in the picture and the square that mask codes stand for
coco.py        boxes and masks as COCO writes them
overlay.py     boxes, masks and labels drawn over the picture
"""

from gemkit.images.preprocess import preprocess
from gemkit.images.read import LIMITS, Limits, Picture, read

__all__ = ["LIMITS", "Limits", "Picture", "preprocess", "read"]
