"""Training data: files of examples, checked record by record, encoded, and put in an order that can be resumed.

schemas.py     the forms of records, and what is wrong with one that has none
messages.py    messages of any spelling, and the conversations that they make
dialects.py    how other trainers spell records of these forms, and what they mean
files.py       files, folders and the hub to checked records
sources.py     one class for each kind of file, with the line of what is wrong
repo_order.py  the files of a repository in the order in which they build on one another
encoding.py    a record to sequences with a weight for the loss of each token
infilling.py   files of code to sequences that teach infilling
loader.py      records to steps: shuffled, each once an epoch, filled without padding, resumed where it stopped
"""

from gemkit.train.data.encoding import (
    ControlTokenizer,
    encode_answer,
    encode_chat,
    encode_image,
    encode_text,
    prompt_ids,
)
from gemkit.train.data.files import Data, open_data
from gemkit.train.data.infilling import Infilling, encode_infill
from gemkit.train.data.loader import Steps, share
from gemkit.train.data.schemas import FORMS

__all__ = [
    "FORMS",
    "ControlTokenizer",
    "Data",
    "Infilling",
    "Steps",
    "encode_answer",
    "encode_chat",
    "encode_image",
    "encode_infill",
    "encode_text",
    "open_data",
    "prompt_ids",
    "share",
]
