"""A run of ours against Transformers, PEFT and torch's AdamW, from the same start on the same batches."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel

from gemkit.adapters import saved
from gemkit.text import prompts
from gemkit.train import experiment, feed
from gemkit.train.optimizer import learning_rate
from gemkit.train.run import Run, _prepare
from support.tiny import load
from support.tiny_models import LETTERS, write

STEPS, BATCH, RATE = 20, 3, 3e-3


def conversations(path):
    """Of one and two turns, with questions longer than answers."""
    rng = np.random.default_rng(0)

    def words(most):
        return "".join(rng.choice(list(LETTERS[:40]), rng.integers(1, most)))

    lines = []
    for _ in range(STEPS * BATCH):
        turns = [
            {"role": role, "content": words(most)}
            for _ in range(rng.integers(1, 3))
            for role, most in (("user", 30), ("assistant", 15))
        ]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_sft_of_adapters_has_their_curve(tmp_path):
    """20 losses within 1e-4, though ours are computed in parts of 64 tokens, without padding."""
    write(tmp_path / "model", "gemma-3-270m", chat=True)
    conversations(tmp_path / "data.jsonl")
    asked = experiment.set_fields(
        experiment.Experiment("sft"),
        [
            f"model.name={tmp_path / 'model'}",
            f"data.train={tmp_path / 'data.jsonl'}",
            f"data.batch_size={BATCH}",
            f"steps={STEPS}",
            "lora.rank=4",
            "lora.alpha=8",
            "step.microbatch_tokens=64",
            f"optimizer.learning_rate={RATE}",
            "optimizer.warmup=5",
            "optimizer.decay=cosine",
        ],
    )
    with Run.start(asked, tmp_path / "run") as run:
        assert len(run.tokenizer.encode(prompts.END_OF_TURN, control=True)) == 1
        source = feed.steps(run.experiment, run.data, run.objective)
        batches = [next(source) for _ in range(STEPS)]
        run.train()
        settings = run.experiment
    ours = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]

    module = load(tmp_path / "model", dtype="float32")  # the adapter that ours began with, handed over as a file
    _prepare(module, settings)
    saved.save(module, tmp_path / "start", base=str(tmp_path / "model"), named=str(tmp_path / "model"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    trained = [value for value in theirs.parameters() if value.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for step, units in enumerate(batches):
        rows = [unit[0] for unit in units]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row.ids, *[0] * (longest - len(row))] for row in rows])
        seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        labels = torch.tensor(
            [[*np.where(row.weights > 0, row.ids, -100), *[-100] * (longest - len(row))] for row in rows]
        )
        logits = theirs(ids, attention_mask=seen).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        assert ours[step]["loss"] == pytest.approx(loss.item(), abs=1e-4), f"step {step}"
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert ours[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), f"step {step}"
        for group in adamw.param_groups:
            group["lr"] = learning_rate(settings.optimizer, step, STEPS)
        adamw.step()
        adamw.zero_grad()
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1  # it went somewhere
