"""The kernels, compiled for each instruction set that runs here."""

import pytest

from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from gemkit.executors.torch import TorchExecutor
from gemkit.nn.state import KVCache
from support import kernels as built
from support.native_models import MEMBERS, randomised


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> dict[str, built.Kernels]:
    """By name of the instruction set; the portable ones are always there."""
    folder = tmp_path_factory.mktemp("kernels")
    return {isa: built.Kernels(isa, folder) for isa in built.ISAS}


@pytest.fixture(params=built.ISAS)
def kernel(request, kernels) -> built.Kernels:
    return kernels[request.param]


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
