"""Change a model: adapters, objectives, data, and one trainer for all of them.

`batching.py` is what a step computes and `objective.py` what can be learned from it: read these first. `losses.py` has
the mathematics, `objectives/` one file for each way to learn, `data/` the files of examples and their order, `step.py`
one step, `loop.py` the loop over them, `checkpoint.py` what survives its being killed, `run.py` the folder of a run.

What may not be here: a second forward pass (models are computed by `nn`), a second loop that generates (answers come
from `generate`), padding.
"""

OBJECTIVES = ("sft", "pretrain", "infill", "distill", "dpo", "reward", "rl")  # the ways to learn, by name
