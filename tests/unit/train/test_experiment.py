"""Experiments: what is written is read, what there is not is said with what there is."""

import dataclasses

import pytest

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.family import Global, Layer, Mlp, Recurrent, Rope, Sliding, repeat
from gemkit.train import experiment as e
from gemkit.train.experiment import Experiment, from_tables, new_model, published, read, set_fields, to_toml

FULL = Experiment(
    objective="dpo",
    steps=7,
    epochs=0.5,
    seed=3,
    model=e.Model(name='a "quoted" \\ name\n', freeze=("vision_tower", "x")),
    data=e.Data(train="a.jsonl", held_out="b.jsonl", form="preference", batch_tokens=4096, on_bad="skip"),
    lora=e.LoRA(rank=4, alpha=8.0, targets=("q_proj",), dropout=0.1, rule="keras"),
    optimizer=e.Optimizer(1e-4, (0.9, 0.96), 1e-8, 0.1, 0.5, 0.03, "cosine", 0.1),
    watch=e.Watch(samples=("Wie geht's?", "日本"), sample_every=5),
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
        ("optimizer.learning_rte=1", r"there is no optimizer\.learning_rte; did you mean learning_rate"),
        ("optimizer.learning_rate=fast", r"optimizer\.learning_rate='fast' must be a number"),
        ("optimizer.learning_rate=nan", r"optimizer\.learning_rate=nan must be at least 0, and finite"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9\] must be a list of 2"),
        ("optimizer.betas=[0.9, 1.0]", "must be from 0 to below 1"),
        ("optimizer.decay=exponential", "'exponential' is not one of 'constant', 'cosine', 'linear', 'rsqrt'"),
        ("objective=stf", "objective='stf' is none; did you mean sft"),
        ("steps=1.5", "steps=1.5 must be a whole number"),
        ("steps=true", "steps=True must be a whole number"),
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
        from_tables({"model": 3}, "x")


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


# ── new models ──────────────────────────────────────────────────────────────────────────────────────────────────────

SIZES = {"width": 64, "ffw_width": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_context": 512}


def test_a_model_of_its_own():
    layers = [{"kind": "sliding", "window": 32, "rope": {"base": 5000}}, {"kind": "global"}]
    decoder, vision = new_model({**SIZES, "layers": layers, "depth": 3, "qk_norm": True}, 300)
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25, "qk_norm": True}
    sliding = Sliding(32, rope=Rope(5000.0), **heads)
    assert decoder.layers == repeat(sliding, Global(**heads), ffw=Mlp(128), total=3)
    assert (decoder.vocab_size, vision) == (300, None)


def test_layers_of_their_own_shape():
    layers = [{"kind": "sliding", "window": 32}, {"kind": "global", "head_dim": 32, "kv_heads": 1, "softcap": 50}]
    decoder, _ = new_model({**SIZES, "layers": layers}, 300)
    assert decoder.attention == (
        Sliding(32, heads=4, kv_heads=2, head_dim=16, scale=0.25),
        Global(heads=4, kv_heads=1, head_dim=32, scale=32**-0.5, softcap=50.0),
    )


def test_a_model_like_a_member():
    decoder, _ = new_model({"like": "gemma-2-2b", **SIZES, "depth": 4}, 300)
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25, "softcap": 50.0}
    assert decoder.layers == repeat(Sliding(4096, **heads), Global(**heads), ffw=Mlp(128), total=4)
    assert (decoder.final_softcap, decoder.post_norms) == (30.0, True)
    griffin, _ = new_model(
        {"like": "recurrentgemma-2b", "layers": [{"kind": "recurrent", "width": 64, "num_blocks": 4}]}, 9
    )
    assert griffin.layers == (Layer(Recurrent(64, 4), Mlp(7680)),)
    _, vision = new_model({"like": "paligemma-3b-pt-224", "vision": {"image_size": 28, "depth": 2}}, 9)
    assert vision is not None
    assert (vision.tower.image_size, vision.tower.depth, vision.tower.width) == (28, 2, 1152)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "there is no widht; did you mean width"),
        ({**SIZES}, "depth=0 must be"),
        ({"layers": [{"kind": "global"}]}, "heads is missing; `like` takes"),
        ({**SIZES, "layers": [{"kind": "global"}], "ffw_width": 0}, "width=0 of the feed-forward must be"),
        (
            {k: v for k, v in SIZES.items() if k != "width"} | {"layers": [{"kind": "global"}]},
            "width is missing; `like`",
        ),
        ({**SIZES, "layers": [{"kind": "sliding"}]}, r"layers\[0\]: window is missing"),
        ({**SIZES, "layers": [{"kind": "linear"}]}, "kind is one of global, sliding, recurrent"),
        ({**SIZES, "layers": [{"kind": "global", "window": 3}]}, r"layers\[0\]: there is no window"),
        ({"like": "gemma-9"}, "no member of the family is called 'gemma-9'"),
        ({"like": "gemma-2-2b", "depth": 10**9}, "depth=1000000000 must be"),
        ({"like": "gemma-2-2b", "kv_heads": 3}, "does not divide heads"),
        ({"like": "gemma-2-2b", "width": "wide"}, "width='wide' must be a whole number"),
    ],
)
def test_models_that_cannot_be(values, message):
    with pytest.raises((ConfigError, LookupError), match=message):
        new_model(values, 300)
