"""The description of a checkpoint: architecture, tokenizer and prompt formats, from the files alone."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemkit import family
from gemkit.errors import WeightsError
from gemkit.nn import Batch
from gemkit.weights.checkpoint import open_checkpoint
from gemkit.weights.config_hf import to_hf
from gemkit.weights.describe import describe, vocabulary_of, with_adapters
from gemkit.weights.export.hf import save_hf
from gemkit.weights.export.torch_checkpoint import save_torch_checkpoint
from gemkit.weights.formats.sniff import open_reader
from gemkit.weights.load import load_module
from gemkit.weights.resolve import Place
from support.gguf_files import tiny_file
from support.tiny import assert_close, load, reference, tiny, tokens
from support.tiny_models import tokenizer
from support.vocabularies import small_model


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of no weights that anybody would read, with a configuration and a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**to_hf(tiny("gemma-2-2b")), "vocab_size": 512}))
    (folder / "tokenizer.model").write_bytes(small_model())
    return folder


def described(folder, member=None):
    with open_reader(folder) as reader:
        return describe(reader, Place(folder, "it", member))


def prompts(folder, **place):
    with open_checkpoint(Place(folder, "it", **place)) as checkpoint:
        return checkpoint.prompts


def test_a_folder_is_what_its_configuration_says(folder):
    found = described(folder)
    assert (found.decoder.vocab_size, found.decoder.width) == (512, tiny("gemma-2-2b").width)
    assert (found.vision, found.member, found.notes) == (None, None, ())
    assert described(folder, family.get("gemma-2-2b")).member is family.get("gemma-2-2b")


def test_a_tower_that_is_left_out_is_noted(folder):
    text = to_hf(family.get("gemma-3-1b-pt").decoder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    assert described(folder).notes == ("the image tower is left out: the text decoder alone is loaded",)


def test_a_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"it: there is no config\.json in .*: copy it from where"):
        described(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="where an object should be"):
        described(folder)


def test_prompts_are_what_the_files_say(folder):
    assert prompts(folder) == ("complete",)
    assert vocabulary_of(Place(folder, "it"))[1] == ("complete",)
    (folder / "chat_template.jinja").write_text("x")
    assert prompts(folder) == vocabulary_of(Place(folder, "it"))[1] == ("complete", "chat")
    assert prompts(folder, member=family.get("gemma-2-2b")) == family.get("gemma-2-2b").prompts
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert prompts(folder) == ("complete", "chat")


def test_an_adapter_that_was_tuned_for_chat_adds_it(folder, tmp_path):
    tuned, plain = tmp_path / "tuned", tmp_path / "plain"
    for each in (tuned, plain):
        each.mkdir()
    (tuned / "chat_template.jinja").write_text("x")
    assert prompts(folder, adapters=(plain,)) == ("complete",)
    assert prompts(folder, adapters=(plain, tuned)) == ("complete", "chat")
    assert with_adapters(("chat", "infill"), [tuned]) == ("chat", "infill")


def test_a_tokenizer_of_another_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    for rows in (400, 1000):
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        with (
            open_checkpoint(Place(folder, "it")) as checkpoint,
            pytest.raises(WeightsError, match=rf"512 pieces and the embedding {rows} rows"),
        ):
            _ = checkpoint.tokenizer
    (folder / "tokenizer.model").unlink()
    with (
        open_checkpoint(Place(folder, "it")) as checkpoint,
        pytest.raises(WeightsError, match=r"there is no tokenizer\.model or tokenizer\.json"),
    ):
        _ = checkpoint.tokenizer


def test_a_file_without_configuration_is_the_member_of_its_shapes(tmp_path, monkeypatch):
    from dataclasses import replace

    decoder = tiny("gemma-2-2b")
    reference(decoder).save_pretrained(tmp_path / "hf")
    save_torch_checkpoint(load(tmp_path / "hf"), tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="its tensors are those of no member"):
        described(tmp_path / "x.ckpt")
    members = tuple(replace(m, decoder=decoder) if m.name == "gemma-2-2b" else m for m in family.members())
    monkeypatch.setattr(family, "members", lambda: members)
    assert described(tmp_path / "x.ckpt").member.name == "gemma-2-2b"


def test_tensors_that_do_not_fit_are_named_with_the_member_that_they_fit(tmp_path, monkeypatch):
    from dataclasses import replace

    decoder = tiny("gemma-2-2b")
    reference(decoder).save_pretrained(tmp_path / "hf")
    module = load(tmp_path / "hf")
    save_hf(module, tmp_path / "other")
    config = {**json.loads((tmp_path / "other/config.json").read_text()), "intermediate_size": 128}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    members = tuple(replace(m, decoder=decoder) if m.name == "gemma-2-2b" else m for m in family.members())
    monkeypatch.setattr(family, "members", lambda: members)
    message = (
        r"78 tensors do not fit its 288 parameters: .*is \(96, \d+\) in the file, \(128, \d+\) in the model; .*; and "
    )
    with (
        open_checkpoint(Place(tmp_path / "other", "it")) as checkpoint,
        pytest.raises(WeightsError, match=message + r"74 more\. These tensors are those of gemma-2-2b"),
    ):
        _ = checkpoint.parts


def test_a_tower_in_the_file_of_a_gguf_is_left_out_with_a_note(tmp_path):
    """As Ollama keeps Gemma 3 from 4B up."""
    tower = {"v.blk.0.attn_k.weight": (32, 32), "v.patch_embedding.weight": (32, 3, 14, 14), "mm.input.weight": (8,)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in tower.items()}
    theirs = tiny_file(tmp_path / "x.gguf", tensors=tensors, keys={"{arch}.vision.block_count": 1})
    with open_checkpoint(Place(tmp_path / "x.gguf", "it")) as checkpoint:
        module, report = load_module(checkpoint)
    assert report.notes == ["the image tower is left out: the text decoder alone is loaded"]
    ids = tokens(40)[0]
    with torch.inference_mode():
        assert_close(module(Batch.of([ids])), theirs(ids[None]).logits[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"general.type": "adapter", "adapter.type": "lora"},
            "it is a LoRA adapter, not a model; adapters are",
        ),
        ({"general.type": "mmproj"}, r"it is an image tower \(mmproj\), not a model: name the GGUF of the text model"),
        ({"general.type": "vocab"}, "it is a vocabulary without weights"),
        ({"general.type": "imatrix"}, "it is an importance matrix, which quantizers read"),
        ({"general.type": "dataset"}, "it is a GGUF of general.type='dataset', not a model"),
    ],
)
def test_a_gguf_of_something_else_says_what_it_is(keys, message, tmp_path):
    tiny_file(tmp_path / "x.gguf", "gemma-2b", keys=keys)
    with pytest.raises(WeightsError, match=message):
        described(tmp_path / "x.gguf")


def test_a_tower_of_before_there_was_a_type_says_so_too(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "clip")
    tiny_file(tmp_path / "x.gguf", "gemma-2b", writer=writer)
    with pytest.raises(WeightsError, match=r"an image tower \(mmproj\)"):
        described(tmp_path / "x.gguf")


def test_a_gguf_without_types_of_tokens_says_how_it_is_read(tmp_path):
    tiny_file(tmp_path / "x.gguf", tokenizer=tokenizer(), without=("tokenizer.ggml.token_type",))
    with open_checkpoint(Place(tmp_path / "x.gguf", "it")) as checkpoint:
        assert checkpoint.description.notes == ("the GGUF has no token types: control tokens are known by their names",)
        assert checkpoint.tokenizer.is_control(checkpoint.tokenizer.end_of_turn)


def test_infilling_tokens_in_the_metadata_alone_make_a_model_that_infills(tmp_path):
    known = tokenizer(code=True)
    pieces = [f"<unused{i}>" if "fim" in piece else piece for i, piece in enumerate(known.vocabulary.pieces)]
    ids = {f"tokenizer.ggml.{name}_token_id": known.id(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle")}
    keys = {**ids, "tokenizer.ggml.tokens": pieces}
    tiny_file(tmp_path / "x.gguf", "gemma-2b", tokenizer=known, keys=keys)
    with open_checkpoint(Place(tmp_path / "x.gguf", "it")) as checkpoint:
        assert checkpoint.prompts == ("complete", "infill")
