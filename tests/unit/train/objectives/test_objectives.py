"""Each objective against the same written plainly: all logits at once, differentiated by torch, in float64."""

import contextlib
import importlib
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemkit import nn
from gemkit.adapters import lora
from gemkit.errors import ConfigError, DataError, ModelError
from gemkit.text.vocabulary import IMAGE
from gemkit.train import objectives
from gemkit.train.batching import PackedBatch
from gemkit.train.experiment import Experiment
from gemkit.train.objectives import judges, reference
from gemkit.train.objectives.distill import Distill
from gemkit.train.objectives.dpo import Dpo
from gemkit.train.objectives.image import Image
from gemkit.train.objectives.pretrain import Pretrain
from gemkit.train.objectives.reward import Reward, rewards
from gemkit.train.objectives.rl import Grpo
from gemkit.train.objectives.sft import Sft
from support.tiny import TOWER, tiny
from support.tiny_models import tokenizer

chunked = importlib.import_module("gemkit.ops.linear_cross_entropy")  # the function hides its module

WORDS = tokenizer()
TEXT = {"text": "over the hills"}
CHAT = {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two!"}] * 2}
PAIR = {"prompt": "best?", "chosen": "this one", "rejected": "no"}
TURNS = {"prompt": [{"role": "user", "content": "best?"}], "chosen": "yes", "rejected": "not at all"}
MEMBERS = ("gemma-3-270m", "gemma-2-2b", "recurrentgemma-2b")  # without and with a final cap; with a recurrence


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 4 * len(WORDS))
    monkeypatch.setattr(chunked, "_SLAB", 3 * len(WORDS))


def model_of(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, words=WORDS, vision=None) -> Any:
    """The first three layers of a tiny member, with random weights."""
    config = tiny(name)
    config = replace(config, vocab_size=len(words), layers=config.layers[:3])
    model = nn.build(config, vision)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.to(dtype)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def encoded(objective, *records):
    return [unit for record in records for unit in objective.encode(record, rng())]


def log_softmax(model, units) -> tuple[PackedBatch, Tensor]:
    """Of all rows that count, and all of the vocabulary."""
    rows = PackedBatch.of([example for unit in units for example in unit])
    return rows, torch.log_softmax(model.decoder.lm_head(rows.hidden(model)), -1)


def picked(rows: PackedBatch, log_p_MV: Tensor) -> Tensor:
    return log_p_MV.gather(1, rows.targets[:, None])[:, 0]


def of_sequences(rows: PackedBatch, values_M: Tensor, count: int) -> Tensor:
    return torch.stack([values_M[rows.sequences == i].sum() for i in range(count)])


def assert_same_gradient(model, ours: Tensor, theirs: Tensor) -> None:
    """Of the loss and of every weight. Sums of float64 in another order: 1e-14 of the largest, times a few layers."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = [ours, *torch.autograd.grad(ours, weights, allow_unused=True)]
    wanted = [theirs, *torch.autograd.grad(theirs, weights, allow_unused=True)]
    assert any(part is not None and part.any() for part in wanted[1:])
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max().item())


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", MEMBERS)
def test_pretrain(name):
    model, objective = model_of(name), Pretrain(WORDS, Pretrain.Options(z_loss=0.01), context=8)
    units = encoded(objective, TEXT, TEXT)
    assert len(units) == 6  # 15 tokens in pieces of 7 after a <bos>
    loss = objective.loss(model, units)
    rows, log_p_MV = log_softmax(model, units)
    penalty = 0.01 * torch.logsumexp(model.decoder.lm_head(rows.hidden(model)), -1).square().sum()
    assert_same_gradient(model, loss.total, penalty - picked(rows, log_p_MV).sum())
    assert objective.size(units) == 30
    assert loss.metrics["nll"] == pytest.approx(-picked(rows, log_p_MV).sum().item())


@pytest.mark.parametrize("name", MEMBERS)
def test_sft(name):
    model, objective = model_of(name), Sft(WORDS, Sft.Options(smoothing=0.1))
    units = encoded(objective, CHAT, {"prompt": "a", "completion": "bc"})
    rows, log_p_MV = log_softmax(model, units)
    assert len(rows.rows) == 2 * 5 + 3  # two answers of four letters and <end_of_turn>; bc and <eos>
    plain = -0.9 * picked(rows, log_p_MV).sum() - 0.1 * log_p_MV.mean(-1).sum()
    assert_same_gradient(model, objective.loss(model, units).total, plain)


def test_image():
    words = WORDS.with_places()
    vision = replace(TOWER, placeholder=words.id(IMAGE))
    model, objective = model_of("paligemma-3b-pt-224", words=words, vision=vision), Image(words, vision=vision)
    picture = np.random.default_rng(1).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    units = encoded(
        objective,
        {"image": [picture], "prompt": "detect cat", "suffix": "<loc0100> cat"},
        {"image": [picture, picture[::-1]], "prompt": "which", "suffix": "a"},
    )
    rows, log_p_MV = log_softmax(model, units)
    plain = -(rows.weights * picked(rows, log_p_MV)).sum()
    assert_same_gradient(model, objective.loss(model, units).total, plain)
    assert objective.size(units) == pytest.approx(2)  # each example counts the same


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("settings", [{}, {"beta": 1.0, "temperature": 2.0}, {"beta": 0.5}, {"sampled": 7}])
def test_distill(name, settings):
    model, teacher = model_of(name), model_of("gemma-2-2b", seed=3)
    objective = Distill(WORDS, Distill.Options(**settings), teacher=teacher)
    units = encoded(objective, TEXT, CHAT)
    prepared = objective.prepare(model, units, rng())
    rows, _ = log_softmax(model, units)
    heat = settings.get("temperature", 1.0)
    log_p_MV = torch.log_softmax(model.decoder.lm_head(rows.hidden(model)) / heat, -1)
    log_q_MV = torch.log_softmax(teacher.decoder.lm_head(rows.hidden(teacher)) / heat, -1).detach()
    p_MV, q_MV, beta = log_p_MV.exp(), log_q_MV.exp(), settings.get("beta", 0.0)
    if "sampled" in settings:
        ids_MK, probs_MK = (torch.cat([unit[0].extra["teacher"][i] for unit in prepared]) for i in (0, 1))
        torch.testing.assert_close(probs_MK, F.normalize(q_MV.gather(1, ids_MK), p=1, dim=1))
        plain = -(probs_MK * log_p_MV.gather(1, ids_MK)).sum()
    elif beta in (0, 1):
        plain = (q_MV * (log_q_MV - log_p_MV)).sum() if beta == 0 else (p_MV * (log_p_MV - log_q_MV)).sum()
    else:
        mixed_MV = beta * q_MV + (1 - beta) * p_MV
        plain = (
            beta * (q_MV * (log_q_MV - mixed_MV.log())).sum() + (1 - beta) * (p_MV * (log_p_MV - mixed_MV.log())).sum()
        )
    assert_same_gradient(model, objective.loss(model, prepared).total, plain)


def test_gemma_2s_loss_has_the_gradient_of_the_divergence():
    """-sum Q log P and KL(Q || P) differ by what is no function of the student."""
    model, teacher = model_of("gemma-2-2b"), model_of("gemma-2-2b", seed=3)
    objective = Distill(WORDS, teacher=teacher)
    units = encoded(objective, TEXT)
    rows, log_p_MV = log_softmax(model, units)
    q_MV = torch.softmax(teacher.decoder.lm_head(rows.hidden(teacher)), -1).detach()
    ours = objective.loss(model, objective.prepare(model, units, rng())).total
    entropy = -(q_MV * q_MV.log()).sum()
    assert_same_gradient(model, ours + entropy, -(q_MV * log_p_MV).sum())


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("settings", [{}, {"smoothing": 0.1, "beta": 0.5}, {"loss": "ipo", "beta": 0.3}])
def test_dpo(name, settings):
    model, before = model_of(name), model_of(name, seed=4)
    objective = Dpo(WORDS, Dpo.Options(**settings))
    objective.reference = before
    units = objective.prepare(model, encoded(objective, PAIR, TURNS), rng())
    loss = objective.loss(model, units)
    rows, log_p_MV = log_softmax(model, units)
    now = of_sequences(rows, picked(rows, log_p_MV), 4)
    then = of_sequences(rows, picked(*log_softmax(before, units)), 4).detach()
    beta, e, d = objective.options.beta, objective.options.smoothing, now - then
    if "loss" in settings:
        d = d / torch.bincount(rows.sequences)
        plain = ((d[0::2] - d[1::2] - 1 / (2 * beta)) ** 2).sum()
    else:
        odds = torch.sigmoid(beta * (d[0::2] - d[1::2]))
        plain = -((1 - e) * odds.log() + e * (1 - odds).log()).sum()
    assert_same_gradient(model, loss.total, plain)
    assert loss.metrics["accuracy"] == (d[0::2] > d[1::2]).sum()
    assert objective.size(units) == 2


@pytest.mark.parametrize("name", MEMBERS)
def test_reward(name):
    model = model_of(name)
    objectives.new_score(model, seed=1)
    model.score.double()
    objective = Reward(WORDS, Reward.Options(centre=0.01))
    units = encoded(objective, PAIR, TURNS)
    rewards_E = torch.stack(
        [
            model(nn.Batch.of([torch.from_numpy(x.ids)]), output="hidden")[-1] @ model.score.weight[0]
            for u in units
            for x in u
        ]
    )
    chosen, rejected = rewards_E[0::2], rewards_E[1::2]
    plain = -torch.sigmoid(chosen - rejected).log().sum() + 0.01 * ((chosen + rejected) ** 2).sum()
    assert_same_gradient(model, objective.loss(model, units).total, plain)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("variant", ["grpo", "dr_grpo"])
def test_rl(name, variant):
    model = model_of(name)
    objective = Grpo(
        WORDS, Grpo.Options(group=3, max_tokens=6, temperature=0.8, kl=0.5, variant=variant), judge=length_of
    )
    objective.reference = before = model_of(name, seed=4)
    units = objective.prepare(model, encoded(objective, {"prompt": "on"}, {"prompt": TURNS["prompt"]}), rng())
    assert len(units) == 6
    rows, _ = log_softmax(model, units)

    def at_temperature(module) -> Tensor:
        return picked(rows, torch.log_softmax(module.decoder.lm_head(rows.hidden(module)) / 0.8, -1))

    now_M, then_M = at_temperature(model), at_temperature(before).detach()
    advantages = torch.tensor([unit[0].extra["advantage"] for unit in units], dtype=torch.float64)
    given = torch.tensor([unit[0].extra["reward"] for unit in units], dtype=torch.float64).view(2, 3)
    wanted = given - given.mean(1, keepdim=True)
    if variant == "grpo":
        wanted = wanted / (given.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages, wanted.flatten())
    each_M = -torch.exp(now_M - now_M.detach()) * advantages[rows.sequences]
    each_M = each_M + 0.5 * (torch.exp(then_M - now_M) - (then_M - now_M) - 1)
    counts = torch.bincount(rows.sequences) if variant == "grpo" else torch.full((6,), 6)
    assert_same_gradient(model, objective.loss(model, units).total, (each_M / counts[rows.sequences]).sum())


def length_of(prompt, answer, record) -> float:
    return float(len(answer.encode()))


# ---------------------------------------------------------------- what is kept near to


def test_the_reference_of_an_adapter_is_the_model_without_it():
    model = model_of("gemma-2-2b", dtype=torch.float32)
    units = encoded(Dpo(WORDS), PAIR)
    plain = reference.logprobs(model, units[0])
    lora.enable_lora(model, 2)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    changed = reference.logprobs(model, units[0])
    assert reference.frozen(model) is None
    with reference.before_training(model.train(), None) as before:
        for a, b, c in zip(reference.logprobs(before, units[0]), plain, changed, strict=True):
            torch.testing.assert_close(a, b)
            assert not torch.allclose(a, c, atol=1e-3)
            assert not a.requires_grad
    assert model.training
    for a, b in zip(reference.logprobs(model, units[0]), changed, strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_of_all_weights_is_a_copy_that_stays():
    model = model_of("gemma-2-2b")
    kept = reference.frozen(model)
    with torch.no_grad():
        model.decoder.embed_tokens.weight.add_(1)
    assert not torch.equal(kept.decoder.embed_tokens.weight, model.decoder.embed_tokens.weight)
    assert kept.decoder.lm_head.weight is kept.decoder.embed_tokens.weight
    assert not any(weight.requires_grad for weight in kept.parameters())


def test_a_policy_that_has_not_moved_has_no_margin():
    model = model_of("gemma-2-2b")
    objective = Dpo(WORDS)
    objective.reference = reference.frozen(model)
    units = objective.prepare(model, encoded(objective, PAIR), rng())
    assert objective.loss(model, units).total.item() == pytest.approx(math.log(2))


# ---------------------------------------------------------------- answers, and who judges them


def test_the_same_seed_draws_the_same_answers():
    model, objective = model_of("gemma-2-2b"), Grpo(WORDS, Grpo.Options(group=4, max_tokens=5, kl=0), judge=length_of)
    units = encoded(objective, {"prompt": "on"})
    drawn = [[u[0].ids.tolist() for u in objective.prepare(model, units, np.random.default_rng(s))] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.training  # as it was, though answering is done in evaluation mode


def test_equal_rewards_teach_nothing():
    model, objective = (
        model_of("gemma-2-2b"),
        Grpo(WORDS, Grpo.Options(group=3, max_tokens=4, kl=0), judge=lambda *_: 1.0),
    )
    units = objective.prepare(model, encoded(objective, {"prompt": "on"}), rng())
    loss = objective.loss(model, units)
    assert loss.total == 0
    loss.total.backward()
    assert not any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)


def raises(prompt, answer, record):
    raise KeyError("answer")


def hangs(prompt, answer, record):
    while True:
        with contextlib.suppress(Exception):  # as careless code does
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("judge", "why"),
    [
        (raises, "KeyError"),
        (hangs, "more than 0.2 s"),
        (lambda *_: math.nan, "nan"),
        (lambda *_: math.inf, "inf"),
        (lambda *_: "much", "ValueError"),
        (lambda *_: None, "TypeError"),
    ],
)
def test_a_judge_that_fails_counts_nothing_and_ends_nothing(judge, why):
    verdicts = judges.Verdicts(judge, timeout=0.2)
    assert [verdicts("p", "a", {}), verdicts("p", "a", {})] == [0.0, 0.0]
    assert verdicts.failed == 2
    assert why in verdicts.why


def test_failures_are_counted_in_the_metrics():
    model, objective = model_of("gemma-2-2b"), Grpo(WORDS, Grpo.Options(group=2, max_tokens=3, kl=0), judge=raises)
    units = objective.prepare(model, encoded(objective, {"prompt": "on"}, {"prompt": "off"}), rng())
    metrics = [objective.loss(model, [unit]).metrics for unit in units]  # in parts: counted once
    assert sum(m["reward_failed"] for m in metrics) == 4
    assert sum(m["reward"] for m in metrics) == 0


def test_a_reward_model_judges_as_it_was_trained():
    model = model_of("gemma-2-2b", dtype=torch.float32)
    with pytest.raises(ModelError, match="no reward head"):
        judges.Reward(model, WORDS)
    objectives.new_score(model, seed=1)
    chosen = encoded(Reward(WORDS), PAIR)[0][0]
    judge = judges.Reward(model, WORDS)
    assert judge(PAIR["prompt"], PAIR["chosen"]) == pytest.approx(rewards(model, [chosen.ids]).item())
    in_turns = judges.Reward(model, WORDS, ("chat",))
    asked = encoded(Reward(WORDS), TURNS)[0][0]
    assert in_turns("best?", "yes") == pytest.approx(rewards(model, [asked.ids]).item())


@pytest.mark.parametrize("name", ["math", "math:", ":sqrt", "no_such_module:f", "math:no_such", "math:pi"])
def test_a_function_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=r"function|no_such|attribute"):
        judges.function(name)


def test_a_function_is_found_by_its_name():
    assert judges.function("math:sqrt") is math.sqrt


# ---------------------------------------------------------------- made from experiments, and refused


def test_every_objective_that_an_experiment_can_name_is_made():
    from gemkit.train import OBJECTIVES

    for name in OBJECTIVES:
        made = objectives.make(Experiment(objective=name), WORDS, None, "text")
        assert made.name == name
        assert made.forms
    made = objectives.make(Experiment(objective="dpo", options={"beta": 0.3, "loss": "ipo"}), WORDS, None, "preference")
    assert isinstance(made, Dpo)
    assert made.options == Dpo.Options(beta=0.3, loss="ipo")
    assert objectives.others(made, Experiment(objective="dpo")) == 1
    with pytest.raises(ConfigError, match=r"dpo: there is no options\.betta; did you mean beta"):
        objectives.make(Experiment(objective="dpo", options={"betta": 0.3}), WORDS, None, "preference")
    with pytest.raises(ConfigError, match="judge"):
        objectives.make(Experiment(objective="rl", options={"judge": "os:abort"}), WORDS, None, "prompt")
    with pytest.raises(ConfigError, match="a model that sees none"):
        objectives.make(Experiment(objective="sft"), WORDS, None, "image")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dpo.Options(beta=0),
        lambda: Dpo.Options(smoothing=0.5),
        lambda: Dpo.Options(loss="ipo", smoothing=0.1),
        lambda: Dpo.Options(loss="hinge"),  # type: ignore[arg-type]
        lambda: Grpo.Options(group=1),
        lambda: Grpo.Options(temperature=0),
        lambda: Grpo.Options(variant="ppo"),  # type: ignore[arg-type]
        lambda: Distill.Options(sampled=4, beta=1.0),
        lambda: Reward.Options(centre=-1),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_what_misses_is_said():
    model = model_of("gemma-2-2b")
    with pytest.raises(ConfigError, match="teacher"):
        objectives.attach(Distill(WORDS), Experiment(objective="distill"), model)
    with pytest.raises(ConfigError, match="--reward"):
        objectives.attach(Grpo(WORDS, Grpo.Options(kl=0)), Experiment(objective="rl"), model)
    with pytest.raises(ConfigError, match="no reward head"):
        rewards(model, [[1, 2]])
    small = model_of("gemma-2-2b", words=tokenizer(code=True))
    with pytest.raises(ConfigError, match="vocabulary of"):
        Distill(WORDS, teacher=small).prepare(model, encoded(Distill(WORDS), TEXT), rng())


def test_the_same_answer_twice_is_no_preference():
    for objective in (Dpo(WORDS), Reward(WORDS)):
        with pytest.raises(DataError, match="the same tokens"):
            objective.encode({**TURNS, "chosen": "yes ", "rejected": " yes"}, rng())  # turns are stripped


def test_nothing_to_learn_is_no_loss():
    """All labels masked: a sum of 0 over a size of 0, and no division here."""
    model, objective = model_of("gemma-2-2b"), Sft(WORDS)
    unit = encoded(objective, CHAT)[0]
    masked = [(replace(unit[0], weights=np.zeros(len(unit[0]), np.float32)),)]
    assert objective.size(masked) == 0
    loss = objective.loss(model, masked)
    assert loss.total == 0
    loss.total.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
