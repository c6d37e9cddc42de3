"""A runtime: which executor is chosen, modules opened once, changes packed once, from any number of threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import gemkit
from gemkit.errors import ConfigError, ModelError
from gemkit.executors.native import library, packer
from gemkit.generate import Chunk
from gemkit.runtime import open as opening
from gemkit.runtime.open import Runtime, open_runtime
from gemkit.runtime.options import LoadOptions
from gemkit.weights import load as loading
from gemkit.weights.checkpoint import find
from support.tiny_models import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "gemma-3-1b"
    write(folder, "gemma-3-1b")
    return folder


def opened(folder, **options) -> Runtime:
    with find(folder) as checkpoint:
        return open_runtime(checkpoint, LoadOptions(**options))


@pytest.fixture
def counted(monkeypatch):
    """How often modules were read and models packed."""
    calls = []

    def count(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: (calls.append(name), real(*args, **options))[1])

    count(loading, "load_module")
    count(packer, "pack")
    return calls


def together(work, threads: int = 8) -> list:
    """The results of as many threads that begin at once."""
    barrier = threading.Barrier(threads)

    def run(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def test_the_options_choose_the_executor(folder):
    assert opened(folder).executor.name == "native"
    assert opened(folder, weights="int8").executor.name == "native"
    for options in ({"executor": "torch"}, {"dtype": "float32"}, {"dtype": torch.bfloat16}, {"quantized": False}):
        runtime = opened(folder, **options)
        assert runtime.executor.name == "torch"
        assert runtime.module is runtime.executor.module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "gpu"}, "executor='gpu' is not one of auto, native, torch"),
        ({"executor": "native", "device": "cuda"}, "cannot do device='cuda': use executor='torch'"),
        ({"executor": "native", "dtype": torch.float32, "quantized": False}, "dtype=float32, quantized=False"),
    ],
)
def test_options_that_contradict_one_another_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ConfigError, match=message):
        LoadOptions(**options)


def test_quantizing_to_int8_leaves_nothing_that_only_torch_has():
    assert LoadOptions(quantized=False, weights="int8").only_torch == ""
    assert LoadOptions(quantized=False).only_torch == "quantized=False"


def test_native_is_refused_where_there_is_none(folder, monkeypatch):
    def refuse(**_):
        raise ModelError("built without a C++ compiler")

    monkeypatch.setattr(library, "library", refuse)
    monkeypatch.setattr("gemkit.executors.native.executor.library", refuse)
    with pytest.raises(ModelError, match="without a C\\+\\+ compiler"):
        opened(folder, executor="native")
    runtime = opened(folder)
    assert runtime.executor.name == "torch"
    assert "torch computes it: built without a C++ compiler" in runtime.report.notes


def test_the_modules_are_read_once_whoever_asks(folder, counted):
    runtime = opened(folder)
    counted.clear()
    assert not runtime.is_open
    first = runtime.executor
    modules = together(lambda _: runtime.module)
    assert all(module is modules[0] for module in modules)
    assert counted == ["load_module"]
    assert runtime.is_open
    assert runtime.sync() is first, "nothing was changed"


def test_a_change_is_packed_once_whoever_asks(folder, counted):
    runtime = opened(folder)
    before = runtime.sync()
    with torch.no_grad():
        runtime.module.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert runtime.executor is before, "reading the executor packs nothing"
    counted.clear()
    found = together(lambda _: runtime.sync())
    assert counted == ["pack"]
    assert all(executor is found[0] for executor in found)
    assert found[0] is not before
    assert runtime.executor is found[0]


def test_torch_takes_over_once_with_one_warning(folder):
    from gemkit.adapters.lora import enable_lora

    runtime = opened(folder)
    enable_lora(runtime.module, 2, rule="keras")
    with pytest.warns(UserWarning, match="torch computes the model from now on") as caught:
        found = together(lambda _: runtime.sync())
    assert len(caught) == 1
    assert {executor.name for executor in found} == {"torch"}
    assert all(executor is found[0] for executor in found)


def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(ConfigError, match="device='warp' cannot be used on this machine, only: cpu"):
        opened(folder, device="warp")
    opening._check_device("cpu")


def test_adapters_come_and_go_while_others_ask(folder):
    """Every answer is that of the model with the adapter or without it, and the last one is of the last change."""
    model = gemkit.load(folder)
    model.enable_lora(2, quiet=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    ids = model.tokenizer.with_bos(model.tokenizer.encode("one two three"))

    def logits(executor) -> bytes:
        outputs = executor.run([Chunk(0, ids, len(ids))], executor.new_state(1))
        return np.stack(outputs.rows).tobytes()

    possible = set()
    for strength in (0.0, 1.0):
        model.scale_adapter(strength)
        possible.add(logits(model.sync()))
    assert len(possible) == 2
    stop = threading.Event()

    def ask(i):
        if i == 0:
            for strength in (0.0, 1.0) * 10:
                model.scale_adapter(strength)
                model.sync()
            stop.set()
            return set()
        said = set()
        while not stop.is_set():
            said.add(logits(model.sync()))
        return said

    for said in together(ask, 4):
        assert said <= possible
    assert logits(model.sync()) in possible
