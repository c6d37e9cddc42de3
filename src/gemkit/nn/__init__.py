"""The models, written once: modules that compute only through `gemkit.ops`.

`decoder.py` is the text decoder of the whole family: read it first. `griffin.py` is the recurrent mixer of some of its
layers, `siglip.py` the image tower and `multimodal.py` the two together, `layers.py` the modules that all of it is put
together from. `model.py` is the interface of both kinds of model. `mask_decoder.py` stands by itself: codes to a mask
and back. `batch.py` and `state.py` are what goes in beside the weights: the tokens of many sequences laid end to end,
and what a model remembers of them between calls.

What may not be here: an operation of torch's (modules use `Module` and `Parameter` and call ops; a test walks their
syntax trees), a weight read outside the module that owns it, a member's name, memory kept on a module.
"""

from gemkit.nn.batch import Batch
from gemkit.nn.decoder import Decoder
from gemkit.nn.model import LanguageModel
from gemkit.nn.multimodal import Multimodal, build
from gemkit.nn.state import State

__all__ = ["Batch", "Decoder", "LanguageModel", "Multimodal", "State", "build"]
