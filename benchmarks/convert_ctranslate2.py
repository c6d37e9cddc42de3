"""A Hugging Face folder as CTranslate2 reads it: `python convert_ctranslate2.py FOLDER TARGET [PLACE ...]`.

Runs in CTranslate2's environment. Its converter needs torch and transformers, which may be in other places: those are
searched last, so that what is here comes from here. Pieces are the ids in digits: no text is needed to be fast.
"""

import sys

folder, target, *places = sys.argv[1:]
sys.path += places

from ctranslate2.converters import TransformersConverter  # noqa: E402 (it imports what the places hold)


class Digits:
    """As much of a tokenizer as the converter asks for."""

    bos_token, eos_token, unk_token = "2", "1", "3"

    def __init__(self, size: int):
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._size)}


class Converter(TransformersConverter):
    def load_model(self, *args, **kwargs):
        model = super().load_model(*args, **kwargs)
        self._size = model.config.vocab_size
        return model

    def load_tokenizer(self, *args, **kwargs):
        return Digits(self._size)


converter = Converter(folder, load_as_float16=True, low_cpu_mem_usage=True)  # half of float32's memory
converter.convert(target, quantization="int8")
