"""From files to modules and back.

    resolve.py      the name of a model to the place of its files; hub.py downloads, and assembles the starter model
    formats/        readers and writers of the file formats: named tensors at known places of files
    describe.py     the architecture, the tokenizer and the prompt formats of what a reader found
    maps.py         published tensor names and layouts to ours, both ways
    fit.py          where each parameter is among the tensors of a file
    checkpoint.py   all of these, one after the other: a checkpoint that is ready to be loaded
    config_*.py     published configurations to `family` data, both ways
    load.py         a checkpoint to a module; quantize.py on the way
    export/         a module to files
    mask_decoder.py the published file of PaliGemma's mask decoder
    model_card.py   the README of what was changed

Readers trust nothing in a file: every count and offset is checked against the bytes that are there before it is used.
They list what a file holds without importing torch.
"""
