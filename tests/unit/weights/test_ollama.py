"""Models in Ollama's store, made by hand."""

import json

import pytest

from gemkit.errors import UnknownModelError, WeightsError
from gemkit.weights import hub, ollama
from gemkit.weights.resolve import resolve

HASH = "ab" * 32


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """The manifest of gemma3:1b, and what writes one."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f"sha256-{HASH}").write_bytes(b"GGUF")

    def write(*layers, name="host/library/gemma3/1b"):
        path = tmp_path / "manifests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = [{"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest} for kind, digest in layers]
        path.write_text(json.dumps({"schemaVersion": 2, "layers": kinds}))
        return tmp_path / "blobs" / f"sha256-{HASH}"

    return write


def test_a_model_is_its_blob(manifest):
    blob = manifest(("template", "sha256:" + "cd" * 32), ("model", f"sha256:{HASH}"))
    assert ollama.find("gemma3:1b") == blob
    assert hub.locate("gemma3:1b") == (blob, None)
    assert resolve("gemma3:1b").path == blob
    assert ollama.find("gemma3") is None
    manifest(("model", f"sha256:{HASH}"), name="host/someone/tuned/latest")
    assert ollama.find("someone/tuned") == blob


def test_a_model_that_is_not_there_says_where_it_was_looked_for(manifest, tmp_path):
    with pytest.raises(UnknownModelError, match=rf"Ollama has not pulled gemma3:4b \(looked in {tmp_path}\)"):
        hub.locate("gemma3:4b")
    for name in ("../x:1b", "a/b/c:1b", "*:1b", "gemma3:*"):
        assert ollama.find(name) is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([("template", f"sha256:{HASH}")], r"names no model: pull it again \(ollama pull gemma3:1b\)"),
        ([("model", "sha256:../../etc/passwd")], "names no model"),
        ([("model", "sha256:" + "00" * 32)], r"sha256-0+, the weights of gemma3:1b, is missing: pull it again"),
        ([("model", f"sha256:{HASH}"), ("adapter", f"sha256:{HASH}")], "gemma3:1b of Ollama is an adapter on a model"),
    ],
)
def test_a_damaged_store_is_refused(manifest, layers, message):
    manifest(*layers)
    with pytest.raises(WeightsError, match=message):
        ollama.find("gemma3:1b")
