"""A Hugging Face folder as CTranslate2 reads it: `python convert_ctranslate2.py FOLDER TARGET [PLACE ...]`.

Runs in CTranslate2's environment. Its converter needs torch and transformers, which may be in other places: those are
searched last, so that what is here comes from here.
"""

import sys

folder, target, *places = sys.argv[1:]
sys.path += places

from ctranslate2.converters import TransformersConverter  # noqa: E402 (it imports what the places hold)

converter = TransformersConverter(folder, load_as_float16=True, low_cpu_mem_usage=True)  # half of float32's memory
converter.convert(target, quantization="int8")
