"""Those who compute a model, behind one contract: `interface.py` says what an executor takes and gives.

`torch.py` runs the modules themselves, `native/` a packed Program in C++. What may not be here: opening a file of
weights (`runtime` hands arrays over), choosing tokens, anything that knows a request.
"""
