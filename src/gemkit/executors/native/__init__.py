"""The native executor: a Program lowered to flat steps, its weights packed into one file, run by the C++ in `csrc/`.

    Program ─ lower ─ packer ─ packfile (.gkpack) ─ executor ─ library (libgemkit_native.so)

`dequantize.py` is the library's way to make a quantized weight dense for torch, `screening.py` the constants of the
screened output head.
"""
