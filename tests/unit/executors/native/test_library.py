"""The native library where it is missing, and the number of its threads."""

import pytest

from gemkit.errors import ConfigError
from gemkit.executors.native import library as native


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
