"""Members of every kind, torch and native: however sequences are stepped, an answer is that of its request alone."""

from __future__ import annotations

import gc
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from gemkit.executors.torch import TorchExecutor
from gemkit.family import Recurrent
from gemkit.generate import Request, Sampling, complete
from support.interleaving import Interleaving, assert_same_answers
from support.native_models import randomised
from unit.nn import test_multimodal

# member -> layers: global, sliding beside global, and recurrent beside sliding; windows of 8
DEPTHS = {"gemma-2b": 2, "gemma-3-1b": 6, "recurrentgemma-2b": 3}
PATCHES, IMAGE_TOKEN = test_multimodal.PATCHES, test_multimodal.TOWER.placeholder


@pytest.fixture(scope="module", params=[(kind, name) for kind in ("torch", "native") for name in DEPTHS], ids="-".join)
def member(request):
    kind, name = request.param
    module = randomised(name, depth=DEPTHS[name])
    return TorchExecutor(module) if kind == "torch" else NativeExecutor(module.config, pack(module))


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7]),
    top_k=st.sampled_from([None, 20]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 9),
)
# of few tokens, so that beginnings are shared and drafts come up
texts = st.lists(st.integers(3, 5), max_size=30)


@st.composite
def requests(draw) -> Request:
    ids = [2, *draw(texts)]
    borders = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=2)))
    return Request(
        ids,
        draw(samplings),
        max_tokens=draw(st.integers(1, 12)),
        logprobs=draw(st.sampled_from([None, 1])),
        spans=[tuple(borders)] if len(borders) == 2 else (),
    )


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (3, 6, 6)).astype(np.float32)


@st.composite
def pictured(draw) -> Request:
    """An image in front, or two in the middle of a text; or none."""
    text = draw(st.lists(st.integers(3, 9), min_size=1, max_size=8))
    options = {"max_tokens": draw(st.integers(1, 8)), "logprobs": 1}
    match draw(st.integers(0, 2)):
        case 0:
            return Request(text, **options)
        case 1:
            end = PATCHES + len(text)
            return Request([IMAGE_TOKEN] * PATCHES + text, spans=[(0, end)], images=[image(1)], **options)
    block, at = [IMAGE_TOKEN] * PATCHES, 1 + PATCHES + len(text)
    spans = [(1, 1 + PATCHES), (at, at + PATCHES)]
    return Request([2, *block, *text, *block, 3], spans=spans, images=[image(2), image(3)], **options)


def assert_nothing_else_matters(executor, batch, seed: int, cancelled, most: int, close: float) -> None:
    alone = [complete(executor, [request])[0] for request in batch]
    run = Interleaving(executor, batch, Random(seed), cancelled=cancelled, most=most)
    assert_same_answers(batch, run.run(), alone, close)
    gc.collect()
    assert (dict(run.state.lengths), run.state.nbytes) == ({}, 0)


@settings(max_examples=8)
@given(
    batch=st.lists(requests(), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    cancelled=st.sets(st.integers(0, 3), max_size=2),
    most=st.sampled_from([0, 4]),
)
def test_an_answer_depends_on_its_request_alone(member, batch, seed, cancelled, most):
    if any(isinstance(layer.mixer, Recurrent) for layer in member.decoder.layers):  # it cannot see what comes after
        batch = [replace(request, spans=()) for request in batch]
    close = 2e-4 if isinstance(member, TorchExecutor) else 0  # sums in another order; native gives the same bits
    assert_nothing_else_matters(member, batch, seed, cancelled, most, close)


@settings(max_examples=8)
@given(
    batch=st.lists(pictured(), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    cancelled=st.sets(st.integers(0, 3), max_size=2),
)
def test_an_answer_about_images_depends_on_its_request_alone(batch, seed, cancelled):
    assert_nothing_else_matters(test_multimodal.EXECUTOR, batch, seed, cancelled, 0, 2e-4)
