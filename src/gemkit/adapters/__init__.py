"""Small trained changes beside the weights: LoRA and its kin.

`layers.py` are the modules, `lora.py` puts them beside the weights of a model, `merge.py` into the weights, `peft.py`
reads and writes PEFT's files, `resolve.py` finds the base of an adapter.
"""
