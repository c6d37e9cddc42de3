"""What the system says of memory, against memory that is taken."""

import builtins

import numpy as np

from gemkit.memory import available_memory, peak_memory, resident_memory


def test_memory_that_is_taken_is_seen():
    before, peak = resident_memory(), peak_memory()
    assert before is not None
    assert before <= peak + (1 << 20)
    taken = np.ones(256 << 17)  # 256 MiB, each page written to
    assert 250 << 20 < resident_memory() - before < 270 << 20
    assert peak_memory() >= before + (250 << 20)
    del taken


def test_a_system_that_does_not_say(monkeypatch):
    available = available_memory()
    assert available is not None
    assert available > 1 << 20

    def refuse(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", refuse)
    assert available_memory() is None
    assert resident_memory() is None
