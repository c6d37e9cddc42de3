"""Pictures, and what is found in them. Never imports torch.

masks.py    a mask of a thing, between its place in the picture and the square that mask codes stand for
coco.py     boxes and masks as COCO writes them
overlay.py  boxes, masks and labels drawn over the picture
"""
