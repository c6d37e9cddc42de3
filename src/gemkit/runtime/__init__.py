"""From a described checkpoint to something that runs: which executor, packed or as modules, kept or made anew.

What may not be here: arithmetic, prompts, anything that asks a model.
"""
