"""Losses of TRL 1.16 on the same tensors: divergences, DPO, GRPO; and a reward head that others read.

TRL's DPO and GRPO losses are methods of trainers, which take a model, a dataset and a machine to be made. Here one is
made without any of these and given only what its loss reads; a stand-in for the model hands it the log-probabilities of
all tokens, so that what is compared is what TRL makes of them: its own differences, masks, means and clips.
"""

import importlib
import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

from gemkit import nn
from gemkit.adapters import lora, saved
from gemkit.train import losses, objectives
from gemkit.train.batching import Example
from gemkit.train.objectives.dpo import Dpo
from gemkit.train.objectives.pretrain import rows_of
from gemkit.train.objectives.reward import Reward, rewards
from gemkit.train.objectives.rl import Grpo
from gemkit.weights.export.hf import save_hf
from support.tiny import load, reference, save_reference, tiny
from support.tiny_models import tokenizer

chunked = importlib.import_module("gemkit.ops.linear_cross_entropy")  # the function hides its module

WORDS = tokenizer()
PAIRS = [
    {"prompt": "best?", "chosen": "this one", "rejected": "no"},
    {"prompt": "and", "chosen": "on", "rejected": "the other one"},
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 4 * len(WORDS))


@pytest.fixture(scope="module")
def trl():
    """The trainers, imported late: it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TRL imports and calls experimental
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.grpo_trainer import GRPOTrainer
    return SimpleNamespace(dpo=DPOTrainer, grpo=GRPOTrainer, gkd=GKDTrainer)


def model_of(seed: int = 0) -> nn.Decoder:
    config = tiny("gemma-2-2b")
    model = nn.Decoder(replace(config, vocab_size=len(WORDS), layers=config.layers[:2]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.double()


def one_process() -> SimpleNamespace:
    """What `accelerate` does on one machine."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=True,
        unwrap_model=lambda x: x,
    )


def bare(trainer, **attributes):
    """A trainer that was never set up, with what its loss reads."""
    made = trainer.__new__(trainer)
    made.accelerator, made.model = one_process(), torch.nn.Identity().eval()
    made._metrics = {"eval": defaultdict(list)}
    made.aux_loss_enabled = False
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """In float64, whose sums in another order differ by about 1e-15 each; the factor is the number of terms."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_divergence_equals_gkd(trl, beta, temperature):
    model, teacher = model_of(), model_of(seed=1)
    x_MD, y_MD = torch.randn(2, 9, model.config.width, dtype=torch.float64).unbind(0)
    x_MD.requires_grad_()
    mask_M = torch.arange(9) % 3 != 0
    weights_M = torch.ones(int(mask_M.sum()))
    loss = losses.distillation(teacher, y_MD[mask_M], weights_M, beta=beta, temperature=temperature)
    ours, _ = model.lm_head.loss(x_MD[mask_M], loss)
    theirs = trl.gkd.generalized_jsd_loss(
        model.lm_head(x_MD)[None],
        teacher.lm_head(y_MD).detach()[None],
        torch.where(mask_M, 1, -100)[None],
        beta=beta,
        temperature=temperature,
        reduction="sum",
    )
    assert_same(ours, theirs, [x_MD, model.embed_tokens.weight])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "sigmoid"),
        ({"beta": 0.5}, "sigmoid"),
        ({"loss": "ipo"}, "ipo"),
        ({"loss": "robust", "smoothing": 0.2}, "robust"),
    ],
)
def test_dpo_equals_trl(trl, settings, name):
    model = model_of()
    objective = Dpo(WORDS, Dpo.Options(**settings))
    objective.reference = model_of(seed=1)
    rng = np.random.default_rng(0)
    units = objective.prepare(model, [unit for pair in PAIRS for unit in objective.encode(pair, rng)], rng)
    ours = objective.loss(model, units).total / objective.size(units)

    # TRL's batch: all chosen, then all rejected, padded
    examples = [unit[side] for side in (0, 1) for unit in units]
    ids = padded([torch.from_numpy(x.ids) for x in examples])
    mask = padded([torch.from_numpy(x.weights).long() for x in examples])
    log_p = torch.log_softmax(torch.stack([plain_logits(model, row) for row in ids])[:, :-1], -1)
    shown = SimpleNamespace(
        log_probs=log_p.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:],
        entropy=-(log_p.exp() * log_p).sum(-1),
        mean_logits=log_p.mean(-1),
        is_top1=log_p.argmax(-1) == ids[:, 1:],
    )
    known = torch.tensor([x.extra["reference"] for x in examples], dtype=torch.float64)
    trainer = bare(
        trl.dpo,
        beta=objective.options.beta,
        label_smoothing=objective.options.smoothing,
        loss_types=[name],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "ref_chosen_logps": known[:2],
        "ref_rejected_logps": known[2:],
    }
    theirs = trainer._compute_loss(lambda **_: shown, inputs, return_outputs=False)
    assert_same(ours, theirs, [model.embed_tokens.weight])
    margin = trainer._metrics["eval"]["rewards/margins"][0]
    if name != "ipo":
        assert objective.loss(model, units).metrics["margin"] / 2 == pytest.approx(margin)


def plain_logits(model: nn.Decoder, ids: Tensor) -> Tensor:
    return model(nn.Batch.of([ids]))


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_grpo_equals_trl(trl, variant, kl):
    """The objective itself, on answers of 5, 2 and 7 tokens to prompts of 3 and 4."""
    model, before = model_of(), model_of(seed=1)
    objective = Grpo(WORDS, Grpo.Options(max_tokens=7, temperature=0.9, kl=kl, variant=variant), judge=lambda *_: 0.0)
    rng = np.random.default_rng(0)
    units = []
    for prompt, answer, gain in ((3, 5, 1.2), (3, 2, -0.7), (4, 7, 0.3)):
        weights = np.repeat(np.array([0, 1], np.float32), (prompt, answer))
        ids = rng.integers(3, len(WORDS), prompt + answer)
        units.append((Example(ids, weights, extra={"advantage": gain, "reward": 0.0, "cut": False}),))
    rows = rows_of(model, units)
    known_M = rows.loss(before, losses.token_logprobs(rows.targets, temperature=0.9)).detach()
    for i, unit in enumerate(units):
        unit[0].extra["reference"] = known_M[rows.sequences == i]
    ours = objective.loss(model, units).total / objective.size(units)

    log_p_MV = torch.log_softmax(model.lm_head(rows.hidden(model)) / 0.9, -1)
    log_p_M = log_p_MV.gather(1, rows.targets[:, None])[:, 0]
    by_answer = [rows.sequences == i for i in range(3)]
    trainer = grpo_trainer(trl, padded([log_p_M[mine] for mine in by_answer]), variant, kl)
    inputs = answers_of(
        padded([torch.ones(int(mine.sum())) for mine in by_answer]),
        torch.tensor([1.2, -0.7, 0.3], dtype=torch.float64),
        padded([known_M[mine] for mine in by_answer]),
    )
    assert_same(ours, trainer._compute_loss(None, inputs), [model.embed_tokens.weight])


def test_the_clip_equals_trl(trl):
    """With probabilities that have moved since the draw: some of these ratios are beyond the clip on either side."""
    now, old, known = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
    now.requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.2], dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]).double()
    loss, _, stopped = losses.policy_gradient(now, old, known, advantages[:, None].expand(4, 6), clip=0.2, kl=0.1)
    ours = ((loss * mask).sum(1) / mask.sum(1)).mean()
    trainer = grpo_trainer(trl, now, "grpo", 0.1)
    theirs = trainer._compute_loss(None, {**answers_of(mask, advantages, known), "old_per_token_logps": old})
    assert_same(ours, theirs, [now])
    share = trainer._metrics["eval"]["clip_ratio/region_mean"][0]
    assert ((stopped * mask).sum() / mask.sum()).item() == pytest.approx(share)
    assert 0 < share < 1


def grpo_trainer(trl, logprobs: Tensor, variant: str, kl: float):
    return bare(
        trl.grpo,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        beta=kl,
        loss_type=variant,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        max_completion_length=7,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )


def answers_of(mask: Tensor, advantages: Tensor, known: Tensor) -> dict[str, Tensor]:
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    prompt = torch.zeros(len(mask), 2, dtype=torch.int64)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "ref_per_token_logps": known,
    }


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-1b"])
def test_transformers_reads_a_reward_model(name, tmp_path):
    """A folder of ours opens as `...ForSequenceClassification`, and gives the same rewards; and so does ours again."""
    decoder = replace(tiny(name), vocab_size=len(WORDS))
    model = load(save_reference(reference(decoder), tmp_path / "base"))
    objectives.new_score(model, seed=1)
    save_hf(model, tmp_path / "reward", tokenizer=WORDS)
    pair = Reward(WORDS).encode(PAIRS[0], np.random.default_rng(0))[0]
    ours = rewards(model, [example.ids for example in pair])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    assert theirs.num_labels == 1
    theirs.config.pad_token_id = theirs.config.get_text_config().pad_token_id = WORDS.pad
    with torch.no_grad():
        wanted = torch.cat([theirs.eval()(torch.from_numpy(x.ids)[None]).logits[0] for x in pair])
    torch.testing.assert_close(ours.detach(), wanted, rtol=1e-4, atol=1e-5)  # float32, sums in another order
    again = load(tmp_path / "reward")
    torch.testing.assert_close(rewards(again, [x.ids for x in pair]), ours.detach(), rtol=0, atol=0)


def test_peft_reads_an_adapter_with_a_reward_head(tmp_path):
    decoder = replace(tiny("gemma-2-2b"), vocab_size=len(WORDS))
    model = load(save_reference(reference(decoder), tmp_path / "base"))
    lora.enable_lora(model, 2)
    objectives.new_score(model, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    saved.save(model, tmp_path / "adapter", base=None, named=str(tmp_path / "base"))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=WORDS.pad, dtype=torch.float32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks Transformers for an attribute by its old name
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    pair = Reward(WORDS).encode(PAIRS[0], np.random.default_rng(0))[0]
    with torch.no_grad():
        wanted = torch.cat([theirs(torch.from_numpy(x.ids)[None]).logits[0] for x in pair])
        ours = rewards(model, [x.ids for x in pair])
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)  # float32, sums in another order
