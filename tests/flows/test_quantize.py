"""`gemkit quantize` as a user types it: a folder that every verb opens, what it says of it, and what it refuses."""

import json

import pytest

import gemkit

TEXT = "the quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_folder_that_runs(run, models, tmp_path, text):
    folder = tmp_path / "int4"
    code, out, err = run("quantize", models / "random", "-o", folder, "--calibration", text, "--evaluate", text)
    assert code == 0
    assert "layers.*.mlp.up_proj.weight" in out
    assert "perplexity" in out
    assert "weights were quantized to Q4_0, calibrated" in err
    assert str(folder) in err
    assert sorted(path.name for path in folder.iterdir())[:2] == ["config.json", "generation_config.json"]
    code, out, _ = run("generate", "-m", folder, "-n", 3, "-q", "--json", "abc")
    assert code == 0
    assert len(json.loads(out)["answers"][0]["ids"]) == 3
    code, out, _ = run("show", folder)
    assert code == 0
    assert "26" in out


def test_json_says_it_all(run, models, tmp_path, text):
    argv = ["quantize", models / "random", "-o", tmp_path / "int8", "--weights", "int8", "--evaluate", text, "--json"]
    code, out, _ = run(*argv, "-q")
    record = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert record["nbytes"] < 0.4 * record["nbytes_before"]
    assert record["perplexity"] == pytest.approx(record["perplexity_before"], rel=0.05)
    assert len(record["tensors"]) == 1 + 7 * 26
    for tensor in record["tensors"]:
        assert tensor["kind"] == "Q8_0"
        assert 0 < tensor["error"] < 0.01  # steps of 1/127 of the largest of 32, which is about twice their size
        assert tensor["nbytes"] / tensor["nbytes_before"] == 34 / 128
    assert gemkit.load(tmp_path / "int8", executor="torch").score(TEXT).perplexity == pytest.approx(
        record["perplexity"], rel=1e-6
    )


def test_weights_as_an_option_of_other_verbs(run, models):
    code, out, err = run("score", "-m", models / "random", "--weights", "int8", "abc")
    assert code == 0
    assert "183 weights were quantized to Q8_0" in err
    assert "perplexity" in out


def test_plain_rounding(run, models, tmp_path):
    code, _, err = run("quantize", models / "random", "-o", tmp_path / "x", "--no-calibrate")
    assert code == 0
    assert "to Q4_0:" in err
    module = gemkit.load(tmp_path / "x", executor="torch").module
    assert module.get_param("layers.3.mlp.gate_proj.weight").kind.name == "Q4_0"
    assert module.get_param("layers.3.mlp.down_proj.weight").kind.name == "Q5_0"
    assert module.get_param("layers.3.self_attn.v_proj.weight").kind.name == "Q8_0"


def test_a_second_time_finds_nothing_to_do(run, models, tmp_path):
    run("quantize", models / "random", "-o", tmp_path / "a", "--no-calibrate")
    code, _, err = run("quantize", tmp_path / "a", "-o", tmp_path / "b")
    assert code == 0
    assert "stay as they are" in err
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_what_is_refused(error, run, models, tmp_path, text):
    model = models / "random"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is not empty: save to a new folder" in error("quantize", model, "-o", tmp_path / "full")
    new = tmp_path / "new"
    line = error("quantize", model, "-o", new, "--weights", "int8", "--calibration", text)
    assert "cannot take effect with --weights int8" in line
    line = error("quantize", model, "-o", new, "--no-calibrate", "--calibration", text)
    assert "cannot take effect with --no-calibrate" in line
    assert "cannot read" in error("quantize", model, "-o", new, "--calibration", tmp_path / "none")
    text.write_text("")
    assert "the calibration text is empty" in error("quantize", model, "-o", new, "--calibration", text)
    assert "UnknownModelError" in error("quantize", "none", "-o", new)
    assert run("quantize", model)[0] == 2  # no folder to write to
    assert run("quantize", model, "-o", new, "--weights", "int2")[0] == 2
    assert not new.exists()
