"""The intermediate representation of a model: a `Program`, traced from its modules, printable, costed, saved as JSON.

`ir.py` defines it and needs no torch; `trace.py` makes one from a module. What may not be here: executing one, which
is `gemkit.executors`' part, sampling, text.
"""
