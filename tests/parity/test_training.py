"""Fine-tuning an adapter, step by step, against Transformers and PEFT: the same loss at each of 20 steps."""

import json
import warnings

import peft
import pytest
import torch

from gemkit.adapters import lora, saved
from gemkit.text import Tokenizer
from gemkit.train.data import Steps, open_data
from gemkit.train.experiment import Experiment, Optimizer
from gemkit.train.loop import Trainer
from gemkit.train.objectives.sft import Sft
from support.tiny import as_trained, load
from support.tiny_models import write

# PEFT asks Transformers for something by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = 20
SETTINGS = Optimizer(
    learning_rate=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, grad_clip=1.0, warmup=0, decay="constant"
)
WORDS = ["red", "green", "a circle", "two squares, then one more", "left", "from here to the door"]


@pytest.fixture
def records(tmp_path):
    """Questions and answers of quite different lengths."""
    path = tmp_path / "answers.jsonl"
    pairs = [(f"What is {a} of {b}?", f"{b}: {len(a)} | {len(b)}") for a in WORDS for b in WORDS if a != b]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return path


def steps(records, objective):
    return Steps(open_data(records), objective, seed=3, batch_size=3)


def our_losses(folder, adapter, records):
    """By the trainer, each step packed without padding, in parts, its loss computed by chunks of rows."""
    model = load(folder)
    saved.attach(model, adapter, trainable=True)
    objective = Sft(Tokenizer.from_model(folder / "tokenizer.model"))
    logged = []
    trainer = Trainer(
        model,
        objective,
        steps(records, objective),
        Experiment(objective="sft", optimizer=SETTINGS),
        STEPS,
        on_step=logged.append,
    )
    trainer.run()
    return [progress.loss for progress in logged]


def their_losses(theirs, folder, adapter, records):
    """By a plain loop over their model, each step a padded rectangle, with labels of -100 where nothing is learned."""
    model = peft.PeftModel.from_pretrained(theirs, adapter, is_trainable=True).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, SETTINGS.learning_rate, SETTINGS.betas, SETTINGS.eps, weight_decay=SETTINGS.weight_decay
    )
    losses = []
    for units, _ in zip(
        steps(records, Sft(Tokenizer.from_model(folder / "tokenizer.model"))), range(STEPS), strict=False
    ):
        examples = [example for unit in units for example in unit]
        shape = (len(examples), max(map(len, examples)))
        ids, labels, mask = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100), torch.zeros(shape)
        for row, example in enumerate(examples):
            given, learned = torch.from_numpy(example.ids), torch.from_numpy(example.weights) > 0
            ids[row, : len(given)], mask[row, : len(given)] = given, 1
            labels[row, : len(given)][learned] = given[learned]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-2-2b", "recurrentgemma-2b"])
def test_losses_of_fine_tuning_an_adapter(name, records, tmp_path):
    """Within 1e-4, and in fact within 4e-6: float32 sums in another order, carried on by 20 steps. AdamW makes whole
    steps of the least gradients, so a higher rate lets rounding grow: at 1e-2 Gemma 2 is 3e-4 off at the last step."""
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    theirs = as_trained(write(folder, name))
    start = load(folder)
    lora.enable_lora(start, 4, 8)
    saved.save(start, adapter, base="nowhere", named="nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a folder called nowhere has no config
        expected = their_losses(theirs, folder, adapter, records)
    got = our_losses(folder, adapter, records)
    assert len(got) == STEPS
    assert expected[-1] < expected[0] - 0.5  # it learns: curves of nothing would agree as well
    assert got == pytest.approx(expected, abs=1e-4, rel=0)
