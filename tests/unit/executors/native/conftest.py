"""Models for the native executor, beside the modules that define what they compute."""

import pytest

from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from gemkit.executors.torch import TorchExecutor
from gemkit.nn.state import KVCache
from support.native_models import MEMBERS, randomised


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
