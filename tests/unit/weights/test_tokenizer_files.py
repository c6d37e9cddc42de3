"""What stands beside a vocabulary, against the tokenizer that Transformers makes of the same folder."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from gemkit.errors import WeightsError
from gemkit.text import prompts
from gemkit.text.prompts import CHAT_TEMPLATE
from gemkit.text.vocabulary import PieceType
from gemkit.weights.describe import vocabulary_of, with_adapter_turns
from gemkit.weights.resolve import Place
from gemkit.weights.tokenizer_files import chat_template, with_metadata
from support.foreign_templates import CHATML, write_json
from support.tiny_models import tokenizer

TEXT = "<|im_start|>Hi there<|im_end|>\n"


@pytest.fixture
def folder(tmp_path):
    tokenizer().save(tmp_path / "tokenizer.model")
    write_json(tmp_path)
    return tmp_path


def ours(folder):
    return vocabulary_of(Place(folder, "it"))[0]


def settings(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# added tokens


def add_tokens(folder):
    """Two tokens added and saved by Transformers, and the ids that it gives a text with them."""
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    theirs.add_tokens(["<|im_end|>"])
    tuned = folder / "tuned"
    theirs.save_pretrained(tuned)
    return tuned, theirs(TEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("model", [False, True])
def test_added_tokens_are_read_from_tokenizer_json_beside_any_tokenizer_model(folder, model):
    tuned, ids = add_tokens(folder)
    if model:  # as Transformers 4 leaves the original there
        shutil.copy(folder / "tokenizer.model", tuned)
    found = ours(tuned)
    assert found.encode(TEXT, control=True) == ids
    theirs = AutoTokenizer.from_pretrained(tuned)
    assert len(found) == len(theirs)
    added = [found.id("<|im_start|>"), found.id("<|im_end|>")]
    assert added == theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert not set(found.encode(TEXT)) & set(added)  # a user's text stays text
    assert all(map(found.is_control, added))


def test_added_tokens_of_older_files(folder):
    (folder / "tokenizer.json").unlink()
    size = len(tokenizer())
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1, "<|im_start|>": size}))
    found = ours(folder)
    assert found.encode("<|im_start|>", control=True) == [size]
    (folder / "added_tokens.json").unlink()
    entry = {"content": "<|im_start|>", "special": True}
    settings(folder, added_tokens_decoder={str(size): entry, "300": {"content": "<renamed>", "special": True}})
    found = ours(folder)
    assert found.encode("<|im_start|><renamed>", control=True) == [size, 300]
    assert found.vocabulary.types[size] == PieceType.CONTROL


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"9999": {"content": "<x>"}}, r"'<x>' has the id 9999"),
        ({"5": {"content": "a"}}, "both"),
        ({"5": {"content": "<x>", "lstrip": True}}, "'<x>' has lstrip"),
        ({"5": {"special": True}}, "damaged"),
        ({"x": {"content": "<x>"}}, "damaged"),
    ],
)
def test_added_tokens_that_cannot_be(folder, added, message):
    (folder / "tokenizer.json").unlink()
    settings(folder, added_tokens_decoder=added)
    with pytest.raises(WeightsError, match=message):
        ours(folder)


# <bos>, ends, settings


def test_bos_is_put_where_the_tokenizer_of_transformers_puts_it(folder):
    def with_bos():
        theirs = AutoTokenizer.from_pretrained(folder)("Hi")["input_ids"]
        assert prompts.complete(ours(folder), "Hi").ids == theirs
        assert prompts.complete(ours(folder), "Hi", control=True).ids == theirs
        return theirs[0] == 2

    assert with_bos()
    settings(folder, add_bos_token=False)  # has no effect beside a tokenizer.json
    assert with_bos()
    root = json.loads((folder / "tokenizer.json").read_text())
    root["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(root))
    assert not with_bos()
    assert any("no <bos>" in note for note in ours(folder).settings.notes)


def test_ends_of_answers_are_those_of_the_files(folder):
    assert ours(folder).end_ids == {1, 4}
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert ours(folder).end_ids == {1, 4, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert ours(folder).end_ids == {1, 4, 8, 9}
    settings(folder, eos_token={"content": "<|fim_none|>"})
    assert any("<|fim_none|>" in note for note in ours(folder).settings.notes)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(WeightsError, match="eos_token_id='x'"):
        ours(folder)


def test_what_would_change_ids_is_refused(folder):
    settings(folder, split_special_tokens=True)
    with pytest.raises(WeightsError, match="split_special_tokens"):
        ours(folder)


@pytest.mark.parametrize("key", ["add_prefix_space", "do_lower_case", "sp_model_kwargs"])
def test_what_transformers_passes_over_is_noted(folder, key):
    settings(folder, **{key: {"enable_sampling": True} if key == "sp_model_kwargs" else True})
    found, theirs = ours(folder), AutoTokenizer.from_pretrained(folder)
    assert prompts.complete(found, "Hi There").ids == theirs("Hi There")["input_ids"]
    assert any(f"{key}=" in note for note in found.settings.notes)


# chat templates


def test_templates_are_found_where_transformers_finds_them(folder):
    def found():
        there, own = chat_template(folder)
        theirs = AutoTokenizer.from_pretrained(folder).get_chat_template()
        assert there
        assert own.source == theirs
        return own

    settings(folder, chat_template="A" + CHATML)
    assert found().source == "A" + CHATML
    settings(folder, chat_template=[{"name": "default", "template": "B"}, {"name": "tool_use", "template": "T"}])
    assert (found().source, found().tool_use) == ("B", "T")
    (folder / "chat_template.jinja").write_text("C")
    assert found().source == "C"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("D")
    assert (found().source, found().tool_use) == ("C", "D")


def test_templates_that_are_none(folder):
    assert chat_template(folder) == (False, None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert chat_template(folder)[1].source == CHATML
    settings(folder, chat_template=CHAT_TEMPLATE)
    assert chat_template(folder) == (True, None)  # the family's
    settings(folder, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(WeightsError, match="rag, and none is the default"):
        chat_template(folder)
    settings(folder, chat_template=3)
    with pytest.raises(WeightsError, match="neither a text nor a list"):
        chat_template(folder)


def test_an_adapter_brings_its_turns(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "chat_template.jinja").write_text(CHATML)
    base = ours(folder)
    assert with_adapter_turns(base, [folder]).settings.chat_template is None
    assert with_adapter_turns(base, [tmp_path / "adapter"]).settings.chat_template.source == CHATML
    assert base.settings.chat_template is None


# GGUF


def test_metadata_of_a_gguf():
    given = {
        "tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }  # fmt: skip
    found = with_metadata(tokenizer(), given, "x.gguf")
    assert found.settings.special["eos_token"] == "<end_of_turn>"
    assert found.end_ids == {1, 4, 9}
    assert prompts.complete(found, "a").ids == tokenizer().encode("a")
    assert found.settings.chat_template.source == CHATML
    for key in ("eos", "eot"):
        with pytest.raises(WeightsError, match="piece of its"):
            with_metadata(tokenizer(), {f"tokenizer.ggml.{key}_token_id": 10**6}, "x.gguf")
