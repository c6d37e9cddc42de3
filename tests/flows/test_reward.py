"""A reward head from training to the command line: saved with a model or an adapter, read back, asked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gemkit
from gemkit.adapters import lora, registry
from gemkit.errors import ModelError, WeightsError
from gemkit.train import objectives
from gemkit.train.data.encoding import encode_answer
from gemkit.train.objectives.reward import Reward, rewards

NATIVE = 3e-3  # keys and values in float16, 2**-11 of each: 8e-4 of the reward was measured
PAIR = {"prompt": "best?", "chosen": "this one", "rejected": "no"}


def reward_model(models: Path, base: str, seed: int = 1) -> gemkit.Gemma:
    model = gemkit.load(models / base, executor="torch")
    objectives.new_score(model.module, seed)
    return model


def sequences(model) -> list:
    return [example.ids for example in Reward(model.tokenizer).encode(PAIR, np.random.default_rng(0))[0]]


def test_a_saved_reward_model_is_asked(models, tmp_path, run):
    model = reward_model(models, "random")
    wanted = rewards(model.module, sequences(model)).tolist()
    model.save(tmp_path / "reward")
    for executor, tolerance in (("native", NATIVE), ("torch", 1e-5)):
        again = gemkit.load(tmp_path / "reward", executor=executor)
        assert again.is_reward_model
        found = [again.reward(PAIR[side], PAIR["prompt"]) for side in ("chosen", "rejected")]
        assert found == pytest.approx(wanted, rel=tolerance)
        assert again.runtime.is_open is (executor == "torch")  # the score head is in the packed model
    long = 300 * "this one "  # of several chunks
    ids = encode_answer(model.tokenizer, "best?", long).ids
    assert len(ids) > 2 * 512
    native = gemkit.load(tmp_path / "reward", executor="native")
    assert native.reward(long, "best?") == pytest.approx(rewards(model.module, [ids]).item(), rel=NATIVE)
    code, out, _ = run("score", "-m", tmp_path / "reward", "--json", "--prompt", PAIR["prompt"], PAIR["chosen"])
    assert code == 0
    assert json.loads(out)["reward"] == pytest.approx(wanted[0], rel=NATIVE)
    code, out, _ = run("score", "-m", tmp_path / "reward", PAIR["chosen"])
    assert code == 0
    assert out.splitlines()[-1].startswith("reward ")
    assert "log-probability" in out


def test_one_that_was_tuned_for_chat_is_asked_in_turns(models, tmp_path):
    model = reward_model(models, "chat")
    turns = {**PAIR, "prompt": [{"role": "user", "content": PAIR["prompt"]}]}
    pair = Reward(model.tokenizer).encode(turns, np.random.default_rng(0))[0]
    assert model.reward("this one", "best?") == pytest.approx(rewards(model.module, [pair[0].ids]).item(), rel=1e-5)


def test_other_models_have_no_reward(models, run, error):
    model = gemkit.load(models / "random")
    assert not model.is_reward_model
    with pytest.raises(ModelError, match="no reward head"):
        model.reward("a")
    _, out, _ = run("score", "-m", models / "random", "--json", "a")
    assert "reward" not in json.loads(out)
    assert "is for a reward model" in error("score", "-m", models / "random", "--prompt", "a", "b")


def test_an_adapter_takes_the_head_with_it(models, tmp_path):
    model = gemkit.load(models / "random", executor="torch")
    model.enable_lora(2, quiet=True)
    objectives.new_score(model.module, seed=1)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    wanted = rewards(model.module, sequences(model)).tolist()
    model.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    again = gemkit.load(tmp_path / "adapter")
    assert again.is_reward_model
    assert rewards(again.module, sequences(again)).tolist() == pytest.approx(wanted, rel=1e-6)


def test_a_head_of_another_width_is_refused(models, tmp_path):
    model = reward_model(models, "random")
    wide = torch.nn.Parameter(torch.zeros(1, 7))
    model.module.score.weight = wide
    model.save(tmp_path / "reward")
    with pytest.raises(WeightsError, match=r"score.weight is \(1, 7\)"):
        gemkit.load(tmp_path / "reward", executor="torch")


def test_a_head_that_is_not_finite_is_not_saved(models, tmp_path):
    model = gemkit.load(models / "random", executor="torch")
    model.enable_lora(2, quiet=True)
    objectives.new_score(model.module, seed=1)
    with torch.no_grad():
        model.module.score.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        model.save_adapter(tmp_path / "adapter")


def test_a_head_that_is_there_is_trained_further(models):
    model = reward_model(models, "random")
    before = model.module.score.weight.detach().clone()
    objectives.new_score(model.module, seed=9)
    assert torch.equal(model.module.score.weight, before)
    assert model.module.score.weight.requires_grad
    lora.enable_lora(model.module, 2)
    assert not any("score" in name for name in registry.account(model.module).modules)
