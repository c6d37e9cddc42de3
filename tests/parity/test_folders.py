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
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
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


@pytest.mark.parametrize("variant", ROPES, ids=lambda variant: f"{variant.member}-{variant.name}")
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
