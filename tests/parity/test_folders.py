"""Folders as people bring them, against Transformers 5.23: the same logits, or refused with the reason; never silently
other ones."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gemkit
from gemkit.errors import ContextError, GemkitError
from gemkit.generate import Chunk, Request, generate
from gemkit.nn import Batch
from gemkit.weights.checkpoint import find
from gemkit.weights.load import load_module
from support import tiny_models
from support.tiny import as_trained, assert_close

GEMMA, GEMMA2, GEMMA3, GRIFFIN, PALIGEMMA = (
    "gemma-2b",
    "gemma-2-2b",
    "gemma-3-1b-pt",
    "recurrentgemma-2b",
    "paligemma-3b-pt-224",
)
CONTEXT = 64
IDS = torch.randint(5, 80, (41,), generator=torch.Generator().manual_seed(1))
OLD_ROPE = dict.fromkeys(("rope_theta", "rope_scaling", "rope_local_base_freq", "rope_parameters"))


@dataclass(frozen=True)
class Variant:
    """A folder of a member with keys of its `config.json` changed; None drops a key.

    Args:
        refused: words of the error; None: the logits are those of Transformers.
        noted: words of a note.
    """

    member: str
    name: str
    changes: dict[str, Any]
    refused: str | None = None
    noted: str | None = None


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a member's tiny twin, written once."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        tiny_models.write(folder, name, context=CONTEXT)
        return folder

    return write


def beside(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A folder of the same weights with changed keys in its configuration."""
    for path in source.iterdir():
        if path.name != "config.json":
            os.link(path, folder / path.name)
    config = {**json.loads((source / "config.json").read_text()), **changes}
    config = {name: value for name, value in config.items() if value is not None or name not in changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def theirs(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Transformers' logits of a folder, in float32 and by eager attention (others may drop soft caps)."""
    sees = json.loads((folder / "config.json").read_text())["model_type"] == "paligemma"
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        return as_trained(model)(input_ids=ids[None]).logits[0]


def ours(folder: Path, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, list[str]]:
    """Our logits of a folder, and what the user is told."""
    with find(folder) as checkpoint, torch.inference_mode():
        module, report = load_module(checkpoint)
        return module(Batch.of([ids])), report.notes


def linear(factor: float = 8.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": factor, **more}


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **more}


def ropes(name: str, refused: str | None = None, noted: str | None = None, **keys: Any) -> Variant:
    return Variant(GEMMA3, name, {**OLD_ROPE, **keys}, refused, noted)


def ropes2(name: str, refused: str | None = None, noted: str | None = None, **keys: Any) -> Variant:
    return Variant(GEMMA2, name, {**OLD_ROPE, **keys}, refused, noted)


FULL, SLIDING = "full_attention", "sliding_attention"
ROPES = [
    ropes("no rope keys"),
    ropes("flat, default", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    ropes("flat, other base", noted="rope_parameters", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    ropes("flat, linear", noted="rope_parameters", rope_parameters=linear(rope_theta=1e6)),
    ropes("flat, theta beside", noted="rope_parameters", rope_parameters=linear(), rope_theta=5e4),
    ropes("flat, local base", rope_parameters={"rope_type": "default"}, rope_theta=5e5, rope_local_base_freq=2e3),
    ropes("flat and rope_scaling", "keep one of them", rope_parameters=linear(), rope_scaling=linear(4.0)),
    ropes("old keys", rope_theta=7e5, rope_local_base_freq=3e3, rope_scaling=linear()),
    ropes("old keys, old type", noted="type", rope_scaling={"type": "linear", "factor": 8.0}),
    ropes("whole number", rope_theta=700_000),
    ropes("base in rope_scaling", rope_theta=7e5, rope_scaling=linear(rope_theta=3e3)),
    ropes("dynamic", rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
    ropes("yarn", rope_scaling=yarn()),
    ropes("yarn, factor of attention", rope_scaling=yarn(attention_factor=1.3)),
    ropes("yarn, mscale", rope_scaling=yarn(mscale=1.0, mscale_all_dim=0.5)),
    ropes("yarn, betas", rope_scaling=yarn(beta_fast=8.0, beta_slow=2.0)),
    ropes("nested yarn", rope_parameters={FULL: yarn(rope_theta=1e4), SLIDING: yarn(rope_theta=1e3)}),
    ropes("nested, truncate", rope_parameters={FULL: yarn(), SLIDING: yarn(), "truncate": False}),
    ropes("nested, no base", rope_theta=7e4, rope_parameters={FULL: linear(3.0), SLIDING: {"rope_type": "default"}}),
    ropes("nested, one", rope_local_base_freq=3e3, rope_parameters={FULL: linear(3.0, rope_theta=5e4)}),
    ropes("nested, null", rope_parameters={FULL: linear(3.0, rope_theta=5e4), SLIDING: None}),
    ropes("nested, sliding stretched", rope_parameters={FULL: linear(2.0), SLIDING: linear(4.0)}),
    ropes("nested and rope_scaling", rope_parameters={FULL: {"rope_theta": 5e5}, SLIDING: {}}, rope_scaling=linear()),
    ropes("llama3", "llama3", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    ropes2("no rope keys"),
    ropes2("linear, old type", rope_scaling={"type": "linear", "factor": 2.0}),
    ropes2("linear, whole number", rope_parameters=linear(2, rope_theta=5000)),
    ropes2("base beside", rope_parameters={"rope_type": "default"}, rope_theta=5e3),
    ropes2("two generations", noted="gives way", rope_parameters={"rope_theta": 3e3}, rope_scaling=linear(2.0)),
    ropes2("dynamic", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    ropes2("yarn", rope_scaling=yarn()),
    ropes2("yarn, untruncated", rope_scaling=yarn(truncate=False)),
    ropes2("yarn, context beside", rope_scaling=yarn(), original_max_position_embeddings=24),
    ropes2("yarn, context by the class", rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    ropes2("nested", "share one rope", rope_parameters={FULL: linear(), SLIDING: linear()}),
    ropes2("a part of each head", "rotated whole", rope_theta=1e4, partial_rotary_factor=0.5),
    Variant(GEMMA, "yarn", {**OLD_ROPE, "rope_scaling": yarn()}),
    Variant(GEMMA, "old keys alone", {**OLD_ROPE, "rope_theta": 5e3}),
    Variant(GRIFFIN, "no rope keys", {**OLD_ROPE, "partial_rotary_factor": None}),
    Variant(GRIFFIN, "linear", {"rope_scaling": linear()}, refused="linear"),
]


KEYS = [
    *(Variant(GEMMA2, f"without {name}", {name: None}) for name in ("num_key_value_heads", "query_pre_attn_scalar")),
    Variant(GEMMA2, "without rms_norm_eps", {"rms_norm_eps": None, "hidden_activation": None}),
    Variant(GEMMA2, "without layer_types", {"layer_types": None}),
    Variant(GEMMA2, "another pattern", {"layer_types": None, "sliding_window_pattern": 3}, noted="sliding_window_p"),
    Variant(GEMMA2, "without caps", {"attn_logit_softcapping": None}),
    Variant(GEMMA2, "classic activation beside", {"hidden_act": "silu"}),
    Variant(GEMMA2, "a key of another library", {"flash_layers": [1]}, noted="flash_layers"),
    Variant(GEMMA2, "biases", {"attention_bias": True}, refused="attention_bias"),
    Variant(GEMMA3, "pattern alone", {"layer_types": None, "_sliding_window_pattern": None}),
    Variant(GEMMA3, "another pattern", {"layer_types": None, "sliding_window_pattern": 3}),
    Variant(GEMMA3, "no pattern is read", {"layer_types": None, "_sliding_window_pattern": 3}, noted="_sliding_window"),
    Variant(GEMMA3, "both ways", {"use_bidirectional_attention": True}, refused="use_bidirectional_attention"),
    Variant(GEMMA3, "other caps", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}, noted="attn_logit"),
    Variant(GEMMA2, "exact gelu", {"hidden_activation": "gelu"}, refused="hidden_activation='gelu'"),
    Variant(GEMMA3, "silu", {"hidden_activation": "silu"}, refused="hidden_activation='silu'"),
    Variant(GEMMA3, "another spelling", {"hidden_activation": "gelu_new"}),
    Variant(GEMMA, "gelu of old files", {"hidden_act": "gelu"}),
    Variant(GEMMA, "an unread activation", {"hidden_activation": "silu"}, noted="hidden_activation"),
    Variant(GEMMA, "epsilon", {"rms_norm_eps": 1e-3}),
    Variant(GRIFFIN, "nulls of the class", {"lru_width": None, "num_key_value_heads": 1}),
    Variant(GRIFFIN, "old names of blocks", {"block_types": None}),
    Variant(GRIFFIN, "unscaled", {"embeddings_scale_by_sqrt_dim": False}, refused="embeddings_scale_by_sqrt_dim"),
    Variant(PALIGEMMA, "as written", {}),
]


@pytest.mark.parametrize("variant", [*ROPES, *KEYS], ids=lambda variant: f"{variant.member}-{variant.name}")
def test_folders_are_read_as_transformers_reads_them(variant, folder_of, tmp_path):
    folder = beside(folder_of(variant.member), tmp_path, variant.changes)
    if variant.refused is not None:
        with pytest.raises(GemkitError, match=variant.refused):
            ours(folder)
        return
    logits, notes = ours(folder)
    assert_close(logits, theirs(folder))  # float32 sums in another order
    said = [note for note in notes if "image tower" not in note]
    assert bool(said) == (variant.noted is not None), said
    assert all(variant.noted in note for note in said if variant.noted)


def native(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of the native executor, which remembers keys and values in float16."""
    executor = gemkit.load(folder, executor="native").sync()
    outputs = executor.run([Chunk(0, ids.tolist(), rows=len(ids))], executor.new_state(1))
    return torch.from_numpy(np.stack(outputs.rows))


def assert_alike(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Mean KL at most 0.003 nats: the numerics contract of the native executor."""
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    assert kl.sum(-1).mean() <= 0.003


NATIVE = [variant for variant in ROPES if (variant.member, variant.name) in [(GEMMA3, "nested yarn"), (GEMMA2, "yarn")]]


@pytest.mark.parametrize("variant", NATIVE, ids=lambda variant: f"{variant.member}-{variant.name}")
def test_the_native_executor_reads_them_alike(variant, folder_of, tmp_path):
    folder = beside(folder_of(variant.member), tmp_path, variant.changes)
    assert_alike(native(folder), theirs(folder))


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_sequences_end_where_a_dynamic_rope_does(executor, folder_of, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0}
    folder = beside(folder_of(GEMMA3), tmp_path, {**OLD_ROPE, "rope_scaling": rope})
    runs = gemkit.load(folder, executor=executor).sync()
    state = runs.new_state(1)
    runs.run([Chunk(0, [5] * CONTEXT)], state)
    with pytest.raises(ContextError, match="dynamically"):
        runs.run([Chunk(0, [5])], state)
    request = Request([5] * 8, max_tokens=CONTEXT)
    (result,) = [event.result for event in generate(runs, [request], beyond_context=True) if event.result]
    assert (result.finish_reason, len(result.ids)) == ("context", CONTEXT - 8)


def renamed(source: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A folder of the same weights under other names."""
    beside(source, folder, {})
    (folder / "model.safetensors").unlink()
    weights = load_file(source / "model.safetensors")
    save_file(
        {rename(name): weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


NAMES: dict[str, Callable[[str], str]] = {
    "no model.": lambda name: name.removeprefix("model."),
    "model.model.": lambda name: f"model.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled parts": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "parallel": lambda name: f"module.{name}",
    "parallel and compiled": lambda name: f"module._orig_mod.{name}",
    "of PEFT": lambda name: "base_model.model." + name.replace("q_proj.", "q_proj.base_layer."),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_with_wrappers_are_those_within(name, folder_of, tmp_path):
    """Transformers reads the first two, and fills the others with random numbers."""
    folder = renamed(folder_of(GEMMA2), tmp_path, NAMES[name])
    logits, notes = ours(folder)
    assert_close(logits, theirs(folder_of(GEMMA2)))
    if name in ("no model.", "model.model."):
        assert_close(logits, theirs(folder))
    else:
        assert "a wrapper of training" in notes[0]


def test_pickled_weights_are_read_safely(folder_of, tmp_path):
    folder = beside(folder_of(GEMMA2), tmp_path, {})
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    assert_close(ours(folder)[0], theirs(folder))


def test_a_single_file_goes_before_an_index(folder_of, tmp_path):
    source = folder_of(GEMMA)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    sharded, _ = ours(tmp_path)
    assert_close(sharded, theirs(tmp_path))
    os.link(source / "model.safetensors", tmp_path / "model.safetensors")
    single, notes = ours(tmp_path)
    assert_close(single, theirs(tmp_path))
    assert not torch.allclose(single, sharded)
    assert "model.safetensors is read" in notes[-1]


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("member", [GEMMA2, GEMMA3])
def test_a_head_that_equals_the_embedding_is_the_embedding(member, tied, folder_of, tmp_path):
    folder = beside(folder_of(member), tmp_path, {"tie_word_embeddings": tied})
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    table = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": table.clone()}, folder / "model.safetensors", {"format": "pt"})
    assert_close(ours(folder)[0], theirs(folder))
    save_file({**weights, "lm_head.weight": table.bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    logits, notes = ours(folder)
    assert_close(logits, theirs(folder), 2**-8)  # of a head that Transformers takes as it is, rounded
    assert "lm_head.weight is the embedding in bfloat16" in notes[-1]
    save_file({**weights, "lm_head.weight": table + 0.5}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GemkitError, match="differs from the embedding"):
        ours(folder)


def test_an_untied_head_must_be_there(folder_of, tmp_path):
    with pytest.raises(GemkitError, match="hold no lm_head"):
        ours(beside(folder_of(GEMMA2), tmp_path, {"tie_word_embeddings": False}))
