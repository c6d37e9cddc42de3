"""The sampler's filters against the logits processors of Transformers, in the order in which it applies them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation.utils import GenerationMixin

from gemkit.generate import INSTRUCTION_TUNED, Sampling
from gemkit.generate.sampler import candidates


def published_probabilities(logits: np.ndarray, sampling: Sampling, history: list[int]) -> np.ndarray:
    """(V,) float64: computed in float64, so that what differs is our rounding and not theirs."""
    generator = GenerationMixin()
    generator.config = PretrainedConfig()
    config = GenerationConfig(
        do_sample=True,
        temperature=float(sampling.temperature),
        top_k=sampling.top_k or 0,  # 0 is off for Transformers
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=float(sampling.repetition_penalty),
        sequence_bias=[[[i], float(bias)] for i, bias in sampling.logit_bias.items()] or None,
    )
    processors = generator._get_logits_processor(config, input_ids_seq_length=len(history), logits_processor=[])
    scores = processors(torch.tensor([history]), torch.tensor(logits, dtype=torch.float64)[None])
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("vocab_size", [7, 300, 20_000])
@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.3),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.3, top_k=10_000),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=2.0, top_p=0.1),
        Sampling(temperature=1.0, top_p=0.0),
        Sampling(temperature=0.7, min_p=0.05),
        Sampling(temperature=1.0, repetition_penalty=1.3),
        Sampling(temperature=1.0, repetition_penalty=0.8),
        Sampling(temperature=1.0, logit_bias={0: 4.0, 6: -7.5}),
        INSTRUCTION_TUNED,
        Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.1, logit_bias={1: 2.0, 3: -3}),
    ],
)
def test_kept_set_and_probabilities_match_transformers(sampling, spread, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = (spread * rng.standard_normal(vocab_size)).astype(np.float32)
    history = rng.integers(0, vocab_size, 30).tolist()
    theirs = published_probabilities(logits, sampling, history)
    ours = candidates(logits, sampling, history)
    assert np.array_equal(ours.ids, np.flatnonzero(theirs))
    # float32 logits times 1 / temperature, then exp: a few units of 6e-8 times the largest exponent, about 1e-5
    # below 1e-37 float32 loses digits and then everything, which no draw can notice
    np.testing.assert_allclose(ours.probabilities, theirs[ours.ids], rtol=1e-5, atol=1e-37)
