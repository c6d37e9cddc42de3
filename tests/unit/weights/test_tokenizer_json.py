"""A tokenizer.json against the tokenizer that Transformers makes of it, alone and beside a tokenizer.model."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from gemkit.errors import WeightsError
from gemkit.text import Tokenizer, prompts
from gemkit.weights.describe import vocabulary_of
from gemkit.weights.resolve import Place
from support.foreign_templates import write_json
from support.tiny_models import tokenizer

TEXT = "Hi  There, a < b"
LOWERCASE = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
CHANGES = {
    "normalizer": LOWERCASE,
    "pre_tokenizer": {"type": "Whitespace"},
    "decoder": {"type": "Fuse"},
    "dropout": 0.5,
    "ignore_merges": True,
    "end_of_word_suffix": "</w>",
}
UNSAID = {
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 20},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    },
    "pre_tokenizer": None,
}


@pytest.fixture
def folder(tmp_path):
    tokenizer().save(tmp_path / "tokenizer.model")
    write_json(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    return tmp_path


def change(folder, key, value):
    path = folder / "tokenizer.json"
    root = json.loads(path.read_text())
    (root if key in root else root["model"])[key] = value
    path.write_text(json.dumps(root))


def say(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def compared(folder):
    """Our tokenizer, after its ids and texts were found to be those of Transformers."""
    ours, theirs = vocabulary_of(Place(folder, "x"))[0], AutoTokenizer.from_pretrained(folder)
    ids = theirs(TEXT)["input_ids"]
    assert prompts.complete(ours, TEXT).ids == ids
    assert ours.decode(ids, control=True) == theirs.decode(ids)
    return ours


@pytest.mark.parametrize("key", CHANGES)
def test_gemmas_class_has_its_own_way_with_a_text(folder, key):
    say(folder, tokenizer_class="GemmaTokenizer")
    change(folder, key, CHANGES[key])
    (note,) = compared(folder).settings.notes
    assert note.startswith(f"tokenizer.json: {key}=")


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("key", CHANGES)
def test_a_class_of_no_model_does_as_the_file_says(folder, key, name):
    say(folder, tokenizer_class=name)
    assert compared(folder).settings.notes == ()
    change(folder, key, CHANGES[key])
    with pytest.raises(WeightsError, match=f"{key}=.* is not implemented"):
        vocabulary_of(Place(folder, "x"))


@pytest.mark.parametrize("name", [None, "GemmaTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("key", UNSAID)
def test_what_changes_no_text(folder, key, name):
    say(folder, **({} if name is None else {"tokenizer_class": name}))
    change(folder, key, UNSAID[key])
    compared(folder)


def test_another_familys_class_is_refused(folder):
    say(folder, tokenizer_class="LlamaTokenizer")  # it puts a space in front
    with pytest.raises(WeightsError, match="tokenizer_class='LlamaTokenizer' is not implemented"):
        vocabulary_of(Place(folder, "x"))


def test_a_tokenizer_model_with_other_pieces_has_no_say(folder):
    vocabulary = tokenizer().vocabulary
    pieces = list(vocabulary.pieces)
    first, second = pieces.index("H"), pieces.index("T")
    pieces[first], pieces[second] = "T", "H"
    Tokenizer.from_pieces(pieces, vocabulary.scores, vocabulary.types).save(folder / "tokenizer.model")
    (note,) = compared(folder).settings.notes
    assert note.startswith("tokenizer.json is used and not the tokenizer.model beside it")
    Tokenizer.from_pieces(
        [*vocabulary.pieces, "zz"], np.append(vocabulary.scores, np.float32(-1)), np.append(vocabulary.types, 1)
    ).save(folder / "tokenizer.model")
    assert "'zz', is there alone" in compared(folder).settings.notes[0]
    shutil.copy(folder / "tokenizer.json", folder / "kept")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(WeightsError, match="its pieces are damaged"):
        vocabulary_of(Place(folder, "x"))
