"""The cache of packed models: its limit, who goes first, turns, and what processes that were killed left behind."""

import os
import threading
from pathlib import Path

import pytest

from gemkit.errors import ConfigError
from gemkit.runtime import pack_cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def put(home: Path, name: str, nbytes: int, used: int) -> Path:
    path = home / name
    with open(path, "wb") as file:
        file.truncate(nbytes)
    os.utime(path, (used, used))
    return path


@pytest.mark.parametrize(
    ("text", "nbytes"), [("", 32 * 10**9), ("20GB", 20 * 10**9), ("1.5 gib", 3 * 2**29), ("512MiB", 2**29), ("7", 7)]
)
def test_the_limit_is_a_size(monkeypatch, text, nbytes):
    monkeypatch.setenv("GEMKIT_CACHE_LIMIT", text)
    assert pack_cache.limit() == nbytes


@pytest.mark.parametrize("text", ["-1", "many", "20 G B", "GB"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("GEMKIT_CACHE_LIMIT", text)
    with pytest.raises(ConfigError, match="is no size: write 20GB"):
        pack_cache.limit()


def test_what_was_used_longest_ago_goes_first(home, monkeypatch):
    monkeypatch.setenv("GEMKIT_CACHE_LIMIT", "1000")
    for i, name in enumerate("bcad"):
        put(home, f"{name}.gkpack", 300, i)
    put(home, "notes.txt", 900, 0)
    assert pack_cache.place("new", 400) == (home / "new.gkpack", "")
    assert [file.path.stem for file in pack_cache.kept()] == ["a", "d"]
    assert (home / "notes.txt").exists(), "what is not ours is not counted, and not removed"


def test_what_cannot_fit_removes_nothing(home, monkeypatch):
    put(home, "a.gkpack", 300, 0)
    monkeypatch.setenv("GEMKIT_CACHE_LIMIT", "1000")
    target, why = pack_cache.place("new", 1001)
    assert target is None
    assert "1,001 bytes are more than GEMKIT_CACHE_LIMIT=1,000" in why
    monkeypatch.delenv("GEMKIT_CACHE_LIMIT")
    usage = os.statvfs(home)
    monkeypatch.setattr(pack_cache, "SPARE", usage.f_frsize * usage.f_blocks)
    target, why = pack_cache.place("new", 1000)
    assert target is None
    assert "bytes of disk left" in why
    assert [file.path.stem for file in pack_cache.kept()] == ["a"]


def test_without_a_home_there_is_no_place(monkeypatch):
    for name in ("GEMKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert pack_cache.folder() is None
    assert pack_cache.place("new", 10) == (None, "there is no home folder")
    assert pack_cache.find("new", "") is None
    assert pack_cache.kept() == []
    with pack_cache.turn("new"):
        pass


def test_unfinished_files_are_removed_when_their_turn_is_free(home):
    """Those of the name that is packed now, by its packer; the others by `clear`, unless somebody is at work."""
    for name in ("one", "two"):
        put(home, f".{name}.gkpack.123.writing", 10, 0)
    with pack_cache.turn("one"):
        assert [file.path.name for file in pack_cache.clear()] == [".two.gkpack.123.writing"]
        pack_cache.place("one", 10)
        assert pack_cache.kept() == []


def test_one_turn_at_a_time(home):
    order, holds = [], threading.Event()

    def second():
        holds.wait()
        with pack_cache.turn("name"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with pack_cache.turn("name"), pack_cache.turn("another"):
        holds.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert list(home.iterdir()) == []


def test_a_folder_that_cannot_be_written_holds_nobody_up(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pack_cache.turn("name"):
        assert pack_cache.kept() == []
        assert pack_cache.find("name", "") is None
