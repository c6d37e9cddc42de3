"""The native executor against the modules themselves, and against itself however it is asked."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from gemkit import family, nn
from gemkit.block_types import KINDS
from gemkit.errors import ConfigError, ModelError, StateError, TextError, WeightsError
from gemkit.executors.native import library as native
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from gemkit.executors.native.packfile import Pack
from gemkit.executors.torch import TorchExecutor
from gemkit.generate import Chunk, Sampling
from gemkit.generate.sampler import logits_filter
from gemkit.nn.state import KVCache
from gemkit.ops import Quantized
from support.outputs import dense
from support.tiny import WINDOW, tiny, tokens

MEMBERS = ["gemma-2b", "gemma-7b", "gemma-2-2b", "gemma-2-27b", "gemma-3-1b", "gemma-3-4b", "recurrentgemma-2b"]


def of_whole_blocks(config: family.DecoderConfig) -> family.DecoderConfig:
    """Widths that are multiples of a block of quantized weights."""
    heads = {"head_dim": 32, "scale": 32**-0.5}
    return family.replace_layers(replace(config, width=128), attention=heads, ffw={"width": 256})


def randomised(name: str, quantized: bool = False, depth: int | None = None) -> nn.Decoder:
    """A member at test size with the weights that `tiny.reference` gives it; quantized ones have random codes."""
    generator = torch.Generator().manual_seed(0)
    config = tiny(name)
    if quantized:  # rows of whole blocks
        config = of_whole_blocks(config)
    module = nn.Decoder(replace(config, layers=config.layers[:depth]))
    for path, weight in list(module.named_parameters()):
        gain = 1.5 if "q_proj" in path or "k_proj" in path else 1
        small = "norm" in path or "bias" in path
        value = torch.randn(weight.shape, generator=generator) * (0.3 if small else gain / weight.shape[-1] ** 0.5)
        if "recurrent_param" in path:
            value.uniform_(-8, 2, generator=generator)
        if quantized and ("_proj" in path or path.startswith("embed_tokens")):
            module.set_param(path, q8_0(value))
        else:
            module.set_param(path, torch.nn.Parameter(value, requires_grad=False))
    return module.eval()


def q8_0(value: torch.Tensor) -> Quantized:
    groups = value.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups / scales.float().clamp_min(1e-9)[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Quantized(KINDS["Q8_0"], {"codes": codes.flatten(1), "scales": scales}, tuple(value.shape))


@pytest.fixture(scope="module", params=MEMBERS)
def pair(request):
    module = randomised(request.param)
    return NativeExecutor(module.config, pack(module)), TorchExecutor(module)


@pytest.fixture
def halves(monkeypatch):
    """Torch's memory of keys and values with the precision of the native one: what is left to differ are sums in
    another order, and a rounding here and there that falls the other way because of them."""
    append = KVCache.append

    def rounded(self, slot, position, k_TKH, v_TKH):
        append(self, slot, position, k_TKH.half().float(), v_TKH.half().float())

    monkeypatch.setattr(KVCache, "append", rounded)


def ids(*lengths: int, seed: int = 1) -> list[list[int]]:
    return [sequence.tolist() for sequence in tokens(*lengths, seed=seed)]


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"off by {error:.1e} of the largest logit, {tolerance:.0e} allowed"


def test_logits_are_those_of_the_modules(pair, halves):
    """4e-3: a key that is rounded to the other side moves by 2**-11, and 46 layers of random weights amplify it."""
    ours, theirs = pair
    chunks = [Chunk(i, sequence, rows=len(sequence)) for i, sequence in enumerate(ids(9 * WINDOW + 30, 7, 1))]
    got, expected = dense(ours, chunks, ours.new_state(3)), dense(theirs, chunks, theirs.new_state(3))
    assert_close(got, expected, 4e-3)


def rounded_to_int8(module: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What the kernels do to the input of a quantized weight: int8 with a scale for each 32 columns."""
    groups = given[0].unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / step.clamp_min(1e-30)).round().mul(step).flatten(-2),)


def test_quantized_weights_are_multiplied_with_int8_activations(halves):
    """5e-3: a code that is rounded to the other side moves by 1/127 of its group's largest. One layer, since layers of
    random weights amplify that."""
    module = randomised("gemma-2-2b", quantized=True, depth=1)
    ours, theirs = NativeExecutor(module.config, pack(module)), TorchExecutor(module)
    for linear in module.modules():
        if isinstance(getattr(linear, "weight", None), Quantized) and not isinstance(linear, nn.layers.Embedding):
            linear.register_forward_pre_hook(rounded_to_int8)
    (prompt,) = ids(40)
    got = dense(ours, [Chunk(0, prompt, rows=40)], ours.new_state(1))
    expected = dense(theirs, [Chunk(0, prompt, rows=40)], theirs.new_state(1))
    assert_close(got, expected, 5e-3)


def one_by_one(executor: NativeExecutor, sequence: list[int]) -> np.ndarray:
    state = executor.new_state(1)
    return np.concatenate([dense(executor, [Chunk(0, [token])], state) for token in sequence])


def test_the_same_bits_however_it_is_cut(pair):
    ours, _ = pair
    prompt, other = ids(150, 40)
    whole = dense(ours, [Chunk(0, prompt, rows=150)], ours.new_state(1))
    assert np.array_equal(one_by_one(ours, prompt), whole)
    state = ours.new_state(2)
    parts = [dense(ours, [Chunk(1, prompt[:70], rows=70), Chunk(0, other, rows=40)], state)]
    parts += [dense(ours, [Chunk(0, [1]), Chunk(1, prompt[70:75], rows=5)], state)[1:]]
    parts += [dense(ours, [Chunk(1, prompt[75:], rows=75)], state)]
    assert np.array_equal(np.concatenate([parts[0][:70], *parts[1:]]), whole)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_same_bits_with_any_number_of_threads(quantized, monkeypatch):
    module = randomised("gemma-2-2b", quantized)
    packed, (prompt,) = pack(module), ids(200)
    found = []
    for count in (1, 2, 3, 5):
        monkeypatch.setenv("GEMKIT_THREADS", str(count))
        executor = NativeExecutor(module.config, packed)
        found.append(dense(executor, [Chunk(0, prompt, rows=200)], executor.new_state(1)))
    assert all(np.array_equal(logits, found[0]) for logits in found[1:])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_runs_a_model(isa, tmp_path):
    """In a process of its own: kernels are chosen once. Where the machine lacks a set it says so."""
    module = randomised("gemma-2-2b", quantized=True)
    target = tmp_path / "model"
    packed, (prompt,) = pack(module, target), ids(70)
    here = NativeExecutor(module.config, packed)
    np.save(tmp_path / "expected.npy", dense(here, [Chunk(0, prompt, rows=70)], here.new_state(1)))
    program = """
import sys
import numpy as np
from pathlib import Path
from gemkit.errors import ConfigError
from gemkit.generate import Chunk
from gemkit.executors.native import library as native
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packfile import Pack
from test_executor import ids, randomised
folder = Path(sys.argv[1])
try:
    able, which = native.available()
except ConfigError as error:
    assert f"GEMKIT_ISA='{sys.argv[2]}': the kernels here are " in str(error), error
    sys.exit(0)
assert (able, which) == (True, sys.argv[2]), which
executor = NativeExecutor(randomised("gemma-2-2b", quantized=True).config, Pack(folder / "model"))
logits = np.stack(executor.run([Chunk(0, ids(70)[0], rows=70)], executor.new_state(1)).rows)
expected = np.load(folder / "expected.npy")
assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max(), np.abs(logits - expected).max()
"""
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), isa],
        env={**os.environ, "GEMKIT_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- what is remembered


def test_a_rolled_back_draft_never_was(pair):
    ours, _ = pair
    prompt, draft, rest = ids(40, 9, 20)
    plain = ours.new_state(1)
    ours.run([Chunk(0, prompt)], plain)
    expected = dense(ours, [Chunk(0, rest, rows=20)], plain)
    state = ours.new_state(1, room=9)
    ours.run([Chunk(0, prompt)], state)
    mark = state.mark(0)
    ours.run([Chunk(0, draft)], state)
    state.rollback(mark)
    assert state.lengths == {0: 40}
    assert np.array_equal(dense(ours, [Chunk(0, rest, rows=20)], state), expected)


def test_part_of_a_draft_can_be_kept(pair):
    ours, _ = pair
    prompt, draft = ids(40, 9)
    state = ours.new_state(1, room=10)
    ours.run([Chunk(0, prompt)], state)
    mark = state.mark(0)
    ours.run([Chunk(0, draft)], state)
    state.rollback(mark, keep=4)
    kept = state.lengths[0] - 40
    assert kept in (0, 4)  # a recurrence can only go back to the mark
    logits = dense(ours, [Chunk(0, [*draft[kept:4], 5])], state)
    assert np.array_equal(logits[0], one_by_one(ours, [*prompt, *draft[:4], 5])[-1])


def test_forks_go_their_own_ways(pair):
    ours, _ = pair
    prompt, a, b = ids(70, 5, 5)
    state = ours.new_state(2)
    ours.run([Chunk(0, prompt)], state)
    state.fork(0, 1)
    first = dense(ours, [Chunk(0, a, rows=5), Chunk(1, b, rows=5)], state)
    for tail, rows in ((a, first[:5]), (b, first[5:])):
        assert np.array_equal(rows, one_by_one(ours, prompt + tail)[70:])
    state.free(0)
    assert state.lengths == {0: 0, 1: 75}
    again = dense(ours, [Chunk(0, prompt), Chunk(1, [3])], state)
    assert np.array_equal(again[1], one_by_one(ours, [*prompt, *b, 3])[-1])


def test_a_window_that_has_moved_on_cannot_be_gone_back_to():
    module = randomised("gemma-3-1b")
    ours = NativeExecutor(module.config, pack(module))
    state = ours.new_state(1)
    ours.run([Chunk(0, ids(20)[0])], state)
    mark = state.mark(0)
    for part in ids(100, 100, 100):
        ours.run([Chunk(0, part)], state)
    with pytest.raises(StateError, match="room=300"):
        state.rollback(mark)
    assert state.lengths == {0: 320}


def test_memory_of_sliding_layers_does_not_grow():
    module = randomised("gemma-3-1b")
    sliding = replace(module.config, layers=module.config.layers[:5])
    small = nn.Decoder(sliding)
    small.load_state_dict({name: value for name, value in module.state_dict().items() if name in small.state_dict()})
    ours = NativeExecutor(sliding, pack(small.requires_grad_(False)))
    state = ours.new_state(1)
    sizes = []
    for part in ids(*[100] * 12):
        ours.run([Chunk(0, part)], state)
        sizes.append(state.nbytes)
    assert max(sizes[3:]) <= 2 * min(sizes)  # a window of 8 is in one page of 64, or in two


def test_settings_that_cannot_be(pair):
    ours, _ = pair
    with pytest.raises(StateError):
        ours.new_state(0)
    with pytest.raises(TextError):
        ours.run([Chunk(0, [10**6])], ours.new_state(1))
    with pytest.raises(ConfigError, match="without an image tower"):
        ours.run([Chunk(0, [1, 2], images=[np.zeros((3, 8, 8), np.float32)])], ours.new_state(1))
    state = ours.new_state(1)
    with pytest.raises(StateError):
        state.fork(0, 1)


def test_keys_beyond_float16_are_refused():
    module = randomised("gemma-2b")
    with torch.no_grad():
        module.layers[3].self_attn.v_proj.weight.mul_(1e7)
    ours = NativeExecutor(module.config, pack(module))
    state = ours.new_state(1)
    with pytest.raises(ModelError, match="float16"):
        ours.run([Chunk(0, [1, 2, 3])], state)
    assert state.lengths == {0: 0}


def test_a_bidirectional_prefix_is_attended_as_the_modules_do(halves):
    module = randomised("gemma-2-2b")
    ours, theirs = NativeExecutor(module.config, pack(module)), TorchExecutor(module)
    chunks = [
        Chunk(i, s, rows=len(s), spans=[(0, p)]) for i, (s, p) in enumerate(zip(ids(150, 30), (100, 9), strict=True))
    ]
    got, expected = dense(ours, chunks, ours.new_state(2)), dense(theirs, chunks, theirs.new_state(2))
    assert_close(got, expected, 4e-3)
    with pytest.raises(ConfigError, match="cut"):
        ours.run([Chunk(0, [1, 2], spans=[(0, 3)])], ours.new_state(1))


# ---------------------------------------------------------------- the screened head


@pytest.fixture(scope="module")
def wide():
    """A decoder whose table is large enough to be screened, with some rows that stand out, as words do in a context."""
    module = nn.Decoder(of_whole_blocks(replace(tiny("gemma-2-2b"), vocab_size=40_000)))
    generator = torch.Generator().manual_seed(3)
    for path, weight in list(module.named_parameters()):
        small = "norm" in path
        value = torch.randn(weight.shape, generator=generator) * (0.3 if small else weight.shape[-1] ** -0.5)
        if path.startswith("embed_tokens"):
            value *= 4
            value[::100] *= 8
        held = q8_0(value) if "_proj" in path or path.startswith("embed_tokens") else value
        module.set_param(path, held if isinstance(held, Quantized) else torch.nn.Parameter(held, requires_grad=False))
    return NativeExecutor(module.config, pack(module))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.0, top_k=20),
        Sampling(temperature=0.7, top_k=64, top_p=0.9),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(logit_bias={7: -np.inf, 39_999: 3.0}),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.2, top_k=5, repetition_penalty=0.8, logit_bias={5: 2.0}),
    ],
)
def test_screening_leaves_every_wanted_row_as_it_is(wide, sampling):
    (prompt,) = ids(40, seed=2)
    state, full = wide.new_state(1), wide.new_state(1)
    screened = 0
    for i, token in enumerate(prompt):
        history = prompt[: i + 1]
        some = logits_filter(sampling, history)
        outputs = wide.run([Chunk(0, [token], filter=some)], state)
        logits = outputs.rows[0]
        screened += outputs.computed[0] < len(logits)
        expected = dense(wide, [Chunk(0, [token])], full)[0]
        shown = logits != -np.inf
        assert np.array_equal(logits[shown], expected[shown])
        counted = expected.copy()
        counted[some.always] = -np.inf
        reach = np.sort(counted)[-some.top_n] - (0 if some.max_gap is None else some.max_gap)
        assert shown[counted >= reach].all()
        assert shown[some.always].all()
    assert screened > 30


# ---------------------------------------------------------------- programs and files that must not run


def test_a_damaged_program_is_refused_or_runs_within_its_bounds(tmp_path):
    """Whatever a word of a step, a buffer or the table says: an error of ours, never memory of others."""
    module = randomised("gemma-2-2b", quantized=True)
    whole = pack(module, tmp_path / "model")
    (prompt,) = ids(5)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = Pack(tmp_path / "model")
        for name in rng.choice(["steps", "buffers"], 1):
            array = getattr(whole, name).copy()
            row, column = rng.integers(array.shape[0]), rng.integers(array.shape[1])
            array[row, column] = rng.choice([-1, 0, 1, 7, 2**31 - 1, -(2**31), int(rng.integers(-100, 10_000))])
            setattr(damaged, name, array)
        try:
            executor = NativeExecutor(module.config, damaged)
        except ModelError:
            refused += 1
            continue
        with contextlib.suppress(ModelError):
            executor.run([Chunk(0, prompt, rows=2)], executor.new_state(1))
    assert refused > 100


@settings(max_examples=60)
@given(st.integers(0, 3000), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_refused_or_harmless(at, data):
    path = _packed()
    original = path.read_bytes()
    broken = path.with_name("broken")
    broken.write_bytes(original[:at] + data + original[at + len(data) :])
    try:
        opened = Pack(broken)
        NativeExecutor(tiny("gemma-2b"), opened)
    except (WeightsError, ModelError):
        pass


def test_a_file_cut_short_is_refused():
    path = _packed()
    original = path.read_bytes()
    cut = path.with_name("cut")
    for size in (0, 7, 16, 100, len(original) // 2, len(original) - 1):
        cut.write_bytes(original[:size])
        with pytest.raises(WeightsError):
            Pack(cut)


_FOLDER = []


def _packed():
    import tempfile
    from pathlib import Path

    if not _FOLDER:
        _FOLDER.append(tempfile.TemporaryDirectory())
        pack(randomised("gemma-2b"), Path(_FOLDER[0].name) / "model")
    return Path(_FOLDER[0].name) / "model"


# ---------------------------------------------------------------- the process around it


def test_a_child_of_a_fork_computes(pair):
    ours, _ = pair
    (prompt,) = ids(30)
    expected = dense(ours, [Chunk(0, prompt)], ours.new_state(1))
    child = os.fork()
    if child == 0:
        same = np.array_equal(dense(ours, [Chunk(0, prompt)], ours.new_state(1)), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_of_python_take_turns(pair):
    ours, _ = pair
    prompts = ids(60, 61, 62, 63)
    expected = [dense(ours, [Chunk(0, p)], ours.new_state(1)) for p in prompts]
    found = [None] * len(prompts)

    def work(i: int) -> None:
        found[i] = dense(ours, [Chunk(0, prompts[i])], ours.new_state(1))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_ctrl_c_ends_a_long_prompt_and_leaves_the_state():
    module = randomised("gemma-7b")
    ours = NativeExecutor(module.config, pack(module))
    state = ours.new_state(1)
    (prompt,) = ids(8000)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            ours.run([Chunk(0, prompt)], state)  # tens of seconds
    finally:
        signal.signal(signal.SIGINT, previous)
    assert state.lengths == {0: 0}  # a prompt that had come to its end would be here
    assert np.isfinite(dense(ours, [Chunk(0, prompt[:10])], state)).all()


def test_without_a_library_it_says_what_to_do(monkeypatch):
    native.library.cache_clear()
    monkeypatch.setenv("GEMKIT_NATIVE", "/nowhere/libgemkit_native.so")
    try:
        able, why = native.available()
        assert not able
        assert "/nowhere/" in why
        monkeypatch.delenv("GEMKIT_NATIVE")
        monkeypatch.setattr(native, "_installed", lambda: None)
        able, why = native.available()
        assert not able
        assert "without a C++ compiler" in why
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize("threads", ["0", "many", "-1", "1000"])
def test_a_number_of_threads_that_cannot_be(threads, monkeypatch):
    monkeypatch.setenv("GEMKIT_THREADS", threads)
    with pytest.raises(ConfigError, match="GEMKIT_THREADS"):
        native.threads()
