"""PEFT's files: what is written is read, and what is damaged is said by its name."""

import json

import pytest
import torch

from gemkit import family
from gemkit.adapters import peft
from gemkit.adapters.peft import Contents, LowRankChange
from gemkit.adapters.peft_config import CONFIG as CONFIG_FILE
from gemkit.errors import WeightsError
from gemkit.weights.maps import name_map
from support.tiny import tiny

CONFIG = tiny("gemma-2-2b")
TABLE = name_map("safetensors", CONFIG, None)
MODULES = {"layers.0.self_attn.q_proj": (64, CONFIG.width), "layers.1.mlp.up_proj": (96, CONFIG.width)}
PARTS = TABLE.parts(CONFIG, dict(family.parameters(CONFIG, None)))
TOLD = {"base": "models/base", "named": "models/base", "text_only": True}


def changes(rank: int = 2, **options) -> list[LowRankChange]:
    drawn = torch.Generator().manual_seed(0)
    return [
        LowRankChange(
            name, torch.randn(rank, into, generator=drawn), torch.randn(out, rank, generator=drawn), 0.25, **options
        )
        for name, (out, into) in MODULES.items()
    ]


def written(folder, what=None, *, base="models/base", **contents):
    held = Contents(changes() if what is None else what, **contents)
    peft.write(folder, held, MODULES, PARTS, TABLE, **{**TOLD, "base": base})
    return folder


def read(folder, modules=MODULES):
    return peft.read(folder, modules, PARTS, TABLE)


def test_what_is_written_is_read(tmp_path):
    found = read(written(tmp_path))
    assert (found.copies, found.rows, found.whole, found.score) == ({}, {}, {}, None)
    for ours, theirs in zip(sorted(found.changes, key=lambda c: c.module), changes(), strict=True):
        assert (ours.module, ours.scale, ours.heads, ours.rank) == (theirs.module, 0.25, 1, 2)
        assert torch.equal(ours.a, theirs.a)
        assert torch.equal(ours.b, theirs.b)


def test_the_names_are_the_published_ones(tmp_path):
    config = json.loads((written(tmp_path) / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 0.5, "models/base")
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"] or "layers" in str(config["target_modules"])
    assert peft.is_adapter(tmp_path)
    assert peft.base_of(tmp_path) == "models/base"
    assert peft.base_of(written(tmp_path, base=None)) is None  # the starter model


def test_a_reward_head_goes_with_it(tmp_path):
    score = torch.randn(1, CONFIG.width)
    found = read(written(tmp_path, score=score))
    assert found.score is not None
    assert torch.equal(found.score, score)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    bad = changes()
    bad[1].b[3, 1] = float("nan")
    with pytest.raises(WeightsError, match=r"up_proj\.lora_B\.weight of the adapter has numbers that are not finite"):
        written(tmp_path, bad)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "no lora_magnitude_vector to go with it"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": "two"}, "r="),
    ],
)
def test_settings_that_compute_something_else_are_refused(tmp_path, change, message):
    path = written(tmp_path) / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WeightsError, match=rf"(?i){message}"):
        read(tmp_path)


def test_another_models_adapter_is_refused(tmp_path):
    written(tmp_path)
    wider = {name: (out, into + 8) for name, (out, into) in MODULES.items()}
    with pytest.raises(WeightsError, match="q_proj"):
        read(tmp_path, wider)
    (tmp_path / peft.MODEL).unlink()
    with pytest.raises(WeightsError, match="holds no"):
        read(tmp_path)
