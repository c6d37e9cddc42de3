"""A model to a file or a folder, one module a format; names and layouts are those of the tables that read it.

`hf` writes Hugging Face's folder, `gguf` a GGUF, `torch_checkpoint` the checkpoints of Google's PyTorch code;
`tensors` gives all of them the tensors of a file.
"""
