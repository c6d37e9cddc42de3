"""From files to modules and back.

    entries.py      what all formats come down to: named tensors at known places of files; which format a path holds
    safetensors.py  one file, or a folder of shards with an index
    gguf.py         metadata, dense tensors and blocks; blocks.py repacks those to the planes of block_types.py
    ckpt.py         torch checkpoints of google/gemma_pytorch, read without running what a pickle asks for
    npz.py          NumPy archives, with no pickles
    shards.py       the index of a checkpoint in several files
    maps.py         published tensor names to ours, both ways
    configs.py      published configurations to `family` data, both ways
    hub.py          checkpoints from afar, and the starter model
    checkpoint.py   what a name or a path stands for: its reader, its architecture, its vocabulary
    mask_decoder.py the published file of PaliGemma's mask decoder and encoder
    load.py, save.py    from a checkpoint to a module, and back
    adapters.py     what PEFT's folders hold: low-rank changes of a model
    card.py         the README of what was changed

Readers trust nothing in a file: every count and offset is checked against the bytes that are there before it is used.
They list what a file holds without importing torch.
"""
