"""What a state promises of sequences with a bidirectional prefix and images: the same as of any other."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemkit import family, nn
from gemkit.errors import ConfigError
from gemkit.executors.torch import TorchExecutor
from gemkit.family import Global, Mlp, Modality, Sliding, Vision, repeat
from gemkit.generate import Chunk, Request, complete, generate, score
from support.outputs import dense

WINDOW = 5
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 8**-0.5, "softcap": 20.0}
CONFIG = family.DecoderConfig(
    vocab_size=64,
    width=24,
    layers=repeat(Sliding(WINDOW, **HEADS), Global(**HEADS), Sliding(1, **HEADS), ffw=Mlp(32), total=3),
    max_context=256,
    post_norms=True,
)
TOWER = Modality(Vision(6, patch_size=2, width=12, depth=1, num_heads=2, mlp_width=16), placeholder=63)
PATCHES = TOWER.tokens  # 9: more than a window


def random_module() -> nn.Multimodal:
    module = nn.Multimodal(CONFIG, TOWER)
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.3, generator=generator)
    return module.requires_grad_(False)


MODULE = random_module()
EXECUTOR = TorchExecutor(MODULE)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (3, 6, 6)).astype(np.float32)


def _span(prefix: int) -> list[tuple[int, int]]:
    return [(0, prefix)] if prefix else []


def feed(state: nn.State, ids: list[int], prefix: int, images=(), slot: int = 0) -> torch.Tensor:
    return torch.from_numpy(dense(EXECUTOR, [Chunk(slot, ids, len(ids), _span(prefix), images)], state))


def whole(ids: list[int], prefix: int, images=()) -> torch.Tensor:
    return feed(MODULE.new_state(), ids, prefix, images)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())  # sums in another order


text = st.lists(st.integers(0, 62), min_size=1, max_size=20)
prompts = text.map(lambda ids: [63] * PATCHES + ids)  # an image and a text


@given(prompt=prompts, answer=text, cuts=st.lists(st.integers(1, 12), min_size=1), extra=st.integers(0, 20))
def test_chunks_after_the_prefix_equal_the_whole(prompt, answer, cuts, extra):
    """The first chunk holds the prefix and some of what follows."""
    ids, at, state, got = prompt + answer, min(len(prompt) + extra, len(prompt + answer)), MODULE.new_state(), []
    got.append(feed(state, ids[:at], len(prompt), [image()]))
    for size in itertools.cycle(cuts):
        if at >= len(ids):
            break
        got.append(feed(state, ids[at : at + size], len(prompt)))
        at += size
    assert_same(torch.cat(got), whole(ids, len(prompt), [image()]))


@given(prompt=prompts, left=text, right=text, draft=text)
def test_copies_and_restores_after_a_prefix(prompt, left, right, draft):
    state = MODULE.new_state(1)
    feed(state, prompt, len(prompt), [image()])
    state.restore(state.snapshot(0))
    snapshot = state.snapshot(1)
    for token in draft:
        feed(state, [token], len(prompt), slot=1)
    state.restore(snapshot, 1)
    for slot, ids in ((0, left), (1, right)):
        expected = whole(prompt + ids, len(prompt), [image()])[len(prompt) :]
        assert_same(feed(state, ids, len(prompt), slot=slot), expected)


@given(prompt=prompts, answer=text)
def test_a_saved_prefix_goes_on(tmp_path_factory, prompt, answer):
    state = MODULE.new_state()
    feed(state, prompt, len(prompt), [image()])
    again = MODULE.new_state()
    again.restore(again.load(state.snapshot(0).save(tmp_path_factory.mktemp("state") / "state.safetensors")), 0)
    assert_same(feed(again, answer, len(prompt)), whole(prompt + answer, len(prompt), [image()])[len(prompt) :])


@given(first=prompts, second=prompts, causal=text)
def test_a_batch_of_images_and_text_equals_each_alone(first, second, causal):
    chunks = [
        Chunk(2, first, len(first), _span(len(first)), [image(1)]),
        Chunk(0, causal, len(causal)),
        Chunk(1, second, len(second), _span(len(second)), [image(2)]),
    ]
    got = torch.from_numpy(dense(EXECUTOR, chunks, MODULE.new_state(3)))
    parts = got.split([len(first), len(causal), len(second)])
    assert_same(parts[0], whole(first, len(first), [image(1)]))
    assert_same(parts[1], whole(causal, 0))
    assert_same(parts[2], whole(second, len(second), [image(2)]))


def test_the_image_matters_and_so_does_the_prefix():
    ids = [63] * PATCHES + [1, 2, 3]
    rows = [whole(ids, 12, [image(1)]), whole(ids, 12, [image(2)]), whole(ids, 11, [image(1)]), whole(ids, 0)]
    for a, b in itertools.combinations(rows, 2):
        assert (a - b).abs().max() > 1e-2


def test_a_request_with_an_image_alone_in_a_batch_and_in_chunks():
    asked = [
        Request([63] * PATCHES + [1, 2, 3], max_tokens=6, spans=[(0, PATCHES + 3)], images=[image(1)], logprobs=0),
        Request(
            [63] * 2 * PATCHES + [4],
            max_tokens=6,
            spans=[(0, 2 * PATCHES + 1)],
            images=[image(2), image(3)],
            logprobs=0,
        ),
        Request([7, 8, 9, 10], max_tokens=6, logprobs=0),
    ]
    for chunk in (1, 13, 512):
        together = complete(EXECUTOR, asked, chunk=chunk)
        for request, result in zip(asked, together, strict=True):
            (alone,) = complete(EXECUTOR, [request])
            assert alone.ids == result.ids
            ids = [*request.ids, *result.ids]
            scored = score(EXECUTOR, ids, spans=request.spans, images=request.images, chunk=chunk)
            got = [entry.logprob for entry in scored.logprobs[len(request.ids) :]]
            assert got == pytest.approx([entry.logprob for entry in result.logprobs], abs=2e-4)


def test_an_interrupted_prefix_is_computed_anew():
    """Ctrl-C inside of the tower and of the decoder: the slot is as it was, and gives the right answer then."""
    request = Request([63] * PATCHES + [1, 2, 3], max_tokens=3, spans=[(0, PATCHES + 3)], images=[image()], slot=0)
    (expected,) = complete(EXECUTOR, [replace(request, slot=None)])
    for module in (MODULE.vision_tower.encoder, MODULE.language_model.layers[1]):
        state = MODULE.new_state()

        def stop(*_):
            raise KeyboardInterrupt

        handle = module.register_forward_hook(stop)
        events = list(generate(EXECUTOR, [request], state=state))
        handle.remove()
        assert events[-1].result.finish_reason == "interrupted"
        assert state.lengths == {0: 0}
        (result,) = complete(EXECUTOR, [request], state=state)
        assert result.ids == expected.ids


def test_images_and_placeholders_must_match():
    state, text_only = MODULE.new_state(), TorchExecutor(nn.Decoder(CONFIG))
    with pytest.raises(ConfigError, match="1 images of 9 patches each, and 8 placeholders"):
        feed(state, [63] * 8 + [1], 9, [image()])
    with pytest.raises(ConfigError, match="2 images of 9 patches each, and 9 placeholders"):
        feed(state, [63] * 9 + [1], 9, [image(), image()])
    with pytest.raises(ConfigError, match="without an image tower"):
        text_only.run([Chunk(0, [63], 1, [(0, 1)], [image()])], text_only.new_state(1))
    with pytest.raises(ConfigError, match=r"the span of tokens 0 to 10 is cut by a chunk of those from 0 to 9"):
        feed(state, [63] * 9, 10, [image()])
    assert state.lengths == {0: 0}


def test_a_rectangle_of_ids_has_no_place_for_an_image():
    """Pixels beside it are an error, not left out in silence: only a `Batch` says which rows they take."""
    ids_BT = torch.tensor([[63] * PATCHES + [1, 2, 3]])
    with pytest.raises(ConfigError, match=rf"{PATCHES} image features for 0 image_rows: must agree"):
        MODULE(ids_BT, pixels_ICSS=torch.from_numpy(image())[None])
