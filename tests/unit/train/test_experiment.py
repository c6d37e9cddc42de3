"""Experiments: what is written is read, what there is not is said with what there is."""

import dataclasses

import pytest

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.train import experiment as e
from gemkit.train.experiment import Experiment, published, read, set_fields
from gemkit.train.tables import convert, to_toml

FULL = Experiment(
    objective="dpo",
    steps=7,
    epochs=0.5,
    seed=3,
    model=e.Model(name='a "quoted" \\ name\n', freeze=("vision_tower", "x")),
    data=e.Data(train="a.jsonl", held_out="b.jsonl", form="preference", batch_tokens=4096, on_bad="skip"),
    lora=e.LoRA(rank=4, alpha=8.0, targets=("q_proj",), dropout=0.1, rule="keras"),
    optimizer=e.Optimizer(1e-4, (0.9, 0.96), 1e-8, 0.1, 0.5, 0.03, "cosine", 0.1),
    monitor=e.Monitor(samples=("Wie geht's?", "日本"), sample_every=5),
    options={"beta": 0.1, "nested": {"two words": [1, 2.5, True]}},
)


@pytest.mark.parametrize("experiment", [Experiment(), FULL])
def test_what_is_written_is_read(tmp_path, experiment):
    (tmp_path / "e.toml").write_text(to_toml(experiment))
    assert read(tmp_path / "e.toml") == experiment


def test_a_file_says_what_differs(tmp_path):
    (tmp_path / "e.toml").write_text('objective = "sft"\n[optimizer]\nlearning_rate = 1\nbetas = [0.9, 0.95]\n')
    found = read(tmp_path / "e.toml")
    assert found.optimizer == e.Optimizer(learning_rate=1.0, betas=(0.9, 0.95))
    assert dataclasses.replace(found, objective="", optimizer=e.Optimizer()) == Experiment()


def test_any_field_is_set_by_name():
    found = set_fields(
        Experiment(),
        [
            "optimizer.learning_rate=1e-4",
            "steps = 20",
            "model.name=gemma-2-2b-it",
            "lora.targets=q_proj",
            "lora.rank=4",
            'model.freeze=["a", "b"]',
            "options.beta=0.2",
            "data.train=x=y.jsonl",
        ],
    )
    assert found.optimizer.learning_rate == 1e-4
    assert (found.steps, found.model.name, found.data.train) == (20, "gemma-2-2b-it", "x=y.jsonl")
    assert (found.lora.targets, found.model.freeze) == (("q_proj",), ("a", "b"))
    assert found.options == {"beta": 0.2}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimiser.learning_rate=1", "there is no optimiser; did you mean optimizer"),
        ("watch.log_every=2", "there is no watch; it is called monitor now"),
        ("optimizer.clip=1.0", r"there is no optimizer\.clip; it is called optimizer\.grad_clip now"),
        ("optimizer.final=0.1", r"it is called optimizer\.final_lr_share now"),
        ("step.max_tokens=9", r"it is called step\.microbatch_tokens now"),
        ("step.checkpointing=on", r"it is called step\.activation_checkpointing now"),
        ("optimizer.learning_rte=1", r"there is no optimizer\.learning_rte; did you mean learning_rate"),
        ("optimizer.learning_rate=fast", r"optimizer\.learning_rate='fast': Expected `float \| null`, got `str`"),
        ("optimizer.learning_rate=nan", r"optimizer\.learning_rate=nan must be at least 0, and finite"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9\]: Expected `array` of length 2"),
        ("optimizer.betas=[0.9, 1.0]", "must be from 0 to below 1"),
        ("optimizer.decay=exponential", "decay='exponential': .*; one of 'constant', 'cosine', 'linear', 'rsqrt'"),
        ("objective=stf", "objective='stf' is none; did you mean sft"),
        ("steps=1.5", "steps=1.5: Expected `int`, got `float`"),
        ("steps=true", "steps=True: Expected `int`, got `bool`"),
        ("steps=-1", "steps=-1 must be at least 0"),
        ("save.keep=0", r"save\.keep=0 must be at least 1"),
        ("step=5", "step must be a table"),
        ("seed.x=1", "seed.x: seed is a value, not a table"),
        ("seed", "'seed' sets nothing: write FIELD=VALUE"),
        ("model.weights=int4", r"give lora\.rank"),
        ("lora.dropout=1.0", r"lora\.dropout=1 must be from 0 to below 1"),
    ],
)
def test_what_cannot_be(assignment, message):
    with pytest.raises(ConfigError, match=message):
        set_fields(Experiment(), [assignment])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML: .*line 1"):
        read(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match=r"model must be a table"):
        convert({"model": 3}, Experiment, "x")


@pytest.mark.parametrize(
    ("name", "new", "rate", "betas", "decay"),
    [
        ("gemma-2-2b", False, 5e-5, (0.9, 0.999), 0.01),
        ("recurrentgemma-2b", False, 1e-4, (0.9, 0.96), 0.1),
        ("paligemma-3b-pt-224", False, 1e-5, (0.9, 0.999), 0.03),
        ("gemma-3-270m", True, 1e-3, (0.9, 0.96), 0.1),
    ],
)
def test_published_settings(name, new, rate, betas, decay):
    member = family.get(name)
    found = published(e.Optimizer(), member.decoder, member.vision, new=new)
    assert (found.learning_rate, found.betas, found.weight_decay) == (rate, betas, decay)
    assert None not in dataclasses.asdict(found).values()
    mine = published(e.Optimizer(learning_rate=3e-3, weight_decay=0.0), member.decoder, member.vision, new=new)
    assert (mine.learning_rate, mine.weight_decay, mine.betas) == (3e-3, 0.0, betas)
