"""Loading: strict, counted, and every change of a number reported."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemkit.errors import ConfigError, WeightsError
from gemkit.weights import load as loading
from gemkit.weights.checkpoint import find
from gemkit.weights.fit import SCORE
from gemkit.weights.load import load_module, weight_bytes
from support.tiny import reference, tiny


@pytest.fixture
def folder(tmp_path):
    reference(tiny("gemma-2-2b")).save_pretrained(tmp_path)
    return tmp_path


def loaded(folder, **options):
    with find(folder) as checkpoint:
        return load_module(checkpoint, **options)


def test_every_weight_is_the_files(folder):
    module, report = loaded(folder)
    stored = load_file(folder / "model.safetensors")
    for name, value in module.named_parameters():
        assert torch.equal(value, stored[f"model.{name}"]), name
        assert not value.requires_grad
    assert not module.training
    assert (report.dtype, report.notes) == ("float32", [])
    assert report.nbytes == report.nbytes_read == weight_bytes(module) == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("asked", ["bf16", "bfloat16", torch.bfloat16])
def test_the_run_dtype_has_several_names(folder, asked):
    module, report = loaded(folder, dtype=asked)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    count = sum(1 for _ in module.parameters())
    assert report.notes == [f"{count} weights were rounded from float32 to bfloat16"]
    assert 2 * report.nbytes == report.nbytes_read


@pytest.mark.parametrize(
    ("dtype", "message"), [("float16", "exceed its largest number, 65504"), ("int8", "is not one of float32, bfloat16")]
)
def test_other_dtypes_are_refused(folder, dtype, message):
    with pytest.raises(ConfigError, match=message):
        loaded(folder, dtype=dtype)


def test_progress_ends_at_the_total_and_counts_each_tensor(folder):
    seen = []
    _, report = loaded(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (report.nbytes_read, report.nbytes_read)
    assert len(seen) == len(load_file(folder / "model.safetensors"))


def test_only_some_weights_are_read(folder):
    module, report = loaded(folder, only=("layers.0.", "norm"))
    there = {name for name, value in module.named_parameters() if not value.is_meta}
    assert there == {name for name, _ in module.named_parameters() if name.startswith(("layers.0.", "norm"))}
    assert report.nbytes_read == sum(module.get_param(name).nbytes for name in there)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB in memory and 0\.0 GB are free: close something"):
        loaded(folder)
    monkeypatch.setattr(loading, "available_memory", lambda: None)  # the system does not say
    loaded(folder)


def test_the_head_of_a_reward_model_is_one_row(folder):
    stored, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    width = tiny("gemma-2-2b").width
    save_file({**stored, SCORE: torch.ones(1, width)}, file)
    assert torch.equal(loaded(folder)[0].score.weight, torch.ones(1, width))
    save_file({**stored, SCORE: torch.ones(2, width)}, file)
    with pytest.raises(WeightsError, match=rf"{SCORE} is \(2, {width}\): a reward head is one row"):
        loaded(folder)
