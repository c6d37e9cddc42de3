"""Small trained changes beside the weights: LoRA and its kin.

`layers.py` are the modules and `targets.py` the places they can have in a model. `lora.py` makes new ones, `saved.py`
brings those of a folder and writes them back (`peft.py` has PEFT's tensors, `peft_config.py` its settings),
`replaced.py` exchanges weights that one brings whole, `registry.py` knows those that a model has, and `merge.py` puts
them into its weights. `resolve.py` finds the base of an adapter.
"""
