"""How a model is executed. `eager.py` runs the modules of `gemkit.nn` themselves, in torch.

Executors share one interface (`gemkit.generate.Executor`): token ids in, float32 logits out, memory in a state. What
may not be here: sampling, text, files.
"""
