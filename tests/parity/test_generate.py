"""The loop on the torch executor against `generate` and the losses of Transformers, with the same random weights."""

from __future__ import annotations

import pytest
import torch

from gemkit.executors.torch import TorchExecutor
from gemkit.generate import Request, Sampling, complete, score
from gemkit.text import Tokenizer
from support.tiny import VOCAB, as_trained, load, reference, save_reference, tiny, tokens
from support.vocabularies import small_model


@pytest.fixture(scope="module", params=["gemma-2-2b", "gemma-3-1b", "recurrentgemma-2b"])
def pair(request, tmp_path_factory):
    theirs = reference(tiny(request.param))
    ours = TorchExecutor(load(save_reference(theirs, tmp_path_factory.mktemp(request.param))))
    return ours, as_trained(theirs)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_answers_match_from_a_ragged_batch(pair, penalty):
    executor, theirs = pair
    prompts = tokens(21, 3, 10)  # the first is more than two windows long
    tokenizer = Tokenizer.from_model(small_model())
    requests = [Request(p.tolist(), Sampling(repetition_penalty=penalty), max_tokens=12) for p in prompts]
    results = complete(executor, requests, text_stream=tokenizer.stream, chunk=8)
    for prompt, result in zip(prompts, results, strict=True):
        expected = theirs.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(result.ids) == expected[0, len(prompt) :].tolist()
        assert result.text == tokenizer.decode(result.ids)


@torch.inference_mode()
def test_scores_match(pair):
    executor, theirs = pair
    (ids,) = tokens(40)
    loss = theirs(ids[None], labels=ids[None]).loss.item()  # mean over all tokens but the first
    scored = score(executor, ids.tolist(), top=VOCAB, chunk=16)
    assert -scored.total / 39 == pytest.approx(loss, rel=1e-5)  # float32 sums in another order
