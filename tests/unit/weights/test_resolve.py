"""A name to the place of its files: paths, members, hub ids, the starter, and an adapter to its base."""

import json
from pathlib import Path

import pytest

from gemkit import family
from gemkit.adapters import resolve as adapters
from gemkit.errors import AccessError, UnknownModelError, WeightsError
from gemkit.weights import hub
from gemkit.weights.resolve import Place, resolve


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """What is downloaded, as (id, whether with weights); nothing is."""
    asked = []

    def download(repo, *, weights=True):
        asked.append((repo, weights))
        return tmp_path / "cache" / repo

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "starter", lambda: tmp_path / "starter.gguf")
    return asked


def adapter(folder: Path, base: object) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_path_is_itself_from_any_folder(tmp_path, monkeypatch, downloads):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    place = resolve("model")
    assert place == Place(Path("model"), "model", name=str(tmp_path / "model"))
    assert place.folder == Path("model")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert resolve(tmp_path / "x.gguf").folder == tmp_path
    assert downloads == []


def test_members_and_hub_ids_are_downloaded(tmp_path, downloads):
    member = family.get("gemma-2-2b-it")
    assert resolve("gemma-2-2b-it") == Place(tmp_path / "cache" / member.hub_id, "gemma-2-2b-it", member, member.hub_id)
    assert resolve("someone/tuned", weights=False) == Place(
        tmp_path / "cache/someone/tuned", "someone/tuned", None, "someone/tuned"
    )
    assert downloads == [(member.hub_id, True), ("someone/tuned", False)]


def test_no_name_is_the_starter(tmp_path, downloads):
    place = resolve(None)
    assert (place.path, place.name, place.member) == (tmp_path / "starter.gguf", None, family.get(hub.STARTER))


def test_what_is_nothing_is_said(downloads):
    with pytest.raises(UnknownModelError, match=r"did you mean gemma-2-2b"):
        resolve("gemma-2-2")
    with pytest.raises(UnknownModelError, match=r"there is no file or folder \./x"):
        resolve("./x")


def test_an_adapter_leads_to_its_base(tmp_path, downloads):
    folder = adapter(tmp_path / "letters", "google/gemma-2-2b-it")
    place = adapters.resolve(folder)
    base = resolve("google/gemma-2-2b-it")
    assert place == Place(base.path, f"{base.label} + {folder}", base.member, base.name, (folder,))
    assert adapters.resolve("google/gemma-2-2b-it") == base


def test_a_base_that_cannot_be_had_is_said_with_the_way_out(tmp_path, downloads, monkeypatch):
    lost = adapter(tmp_path / "lost", str(tmp_path / "nothing"))
    with pytest.raises(UnknownModelError, match=rf"{lost} was trained on .*; or give its base by name: -m BASE"):
        adapters.resolve(lost)
    chained = adapter(tmp_path / "chained", str(lost))
    with pytest.raises(WeightsError, match="which is an adapter itself"):
        adapters.resolve(chained)
    with pytest.raises(WeightsError, match="names no base_model_name_or_path"):
        adapters.resolve(adapter(tmp_path / "nameless", None))

    def gated(repo, **_):
        raise AccessError("no access")

    monkeypatch.setattr(hub, "download", gated)
    with pytest.raises(AccessError, match=r"was trained on google/gemma-2-2b: no access; or give"):
        adapters.resolve(adapter(tmp_path / "gated", "google/gemma-2-2b"))
