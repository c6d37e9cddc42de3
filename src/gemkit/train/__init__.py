"""Change a model: adapters, objectives, data, and one trainer for all of them.

`rows.py` is what a step computes and `objective.py` what can be learned from it: read these first. `losses.py` has the
mathematics, `objectives/` one file for each way to learn, `data/` the files of examples and their order, `lora.py` the
adapters, `trainer.py` the loop and `checkpoint.py` what survives its being killed.

What may not be here: a second forward pass (models are computed by `nn`), a second loop that generates (answers come
from `generate`), padding.
"""
