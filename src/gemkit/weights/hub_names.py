"""Names of models on the hub, in the spellings that other tools have made usual.

owner/name                                  a repository
owner/name@REVISION                         at a branch, tag or commit
owner/name:Q4_K_M                           its GGUF of that quantization (llama.cpp, vLLM)
hf.co/owner/name[:Q4_K_M]                   the same (Ollama)
https://huggingface.co/owner/name           a page of the hub; also .../tree/REVISION,
.../blob/REVISION/FILE, .../resolve/REVISION/FILE
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from gemkit.errors import WeightsError
from gemkit.weights.formats import gguf_parts

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WORD = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PART_OF_NAME = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class HubName:
    """A repository, or one file of it."""

    repo: str
    revision: str | None = None  # None: main
    tag: str | None = None  # the quantization of a GGUF
    file: str | None = None  # a path in the repository

    def __str__(self) -> str:
        """A name that `parse` reads as this one."""
        if self.file:
            return f"hf.co/{self.repo}/resolve/{self.revision or 'main'}/{self.file}"
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.tag}" if self.tag else "")


def is_repo_id(name: str) -> bool:
    """Whether `name` can be a hub id, "owner/name": no path, no escape from the cache folder."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_explicit(name: str) -> bool:
    """Whether a name can be nothing but one on the hub, or no name: it has a host."""
    return "://" in name or name.partition("/")[0] in _HOSTS


def parse(name: str) -> HubName | None:
    """What a name says; None if it is no name on the hub."""
    link = urlsplit(name) if "://" in name else None
    host, _, rest = name.partition("/")
    if link is not None:
        ours = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
        if link.scheme not in ("http", "https") or link.netloc not in {*_HOSTS, ours}:
            return None
        name = unquote(link.path).strip("/")
    elif host in _HOSTS:
        name = rest
    owner, _, rest = name.partition("/")
    repo_name, _, path = rest.partition("/")
    if path:
        return None if link is None and host not in _HOSTS else _of_path(f"{owner}/{repo_name}", path)
    repo_name, _, tag = repo_name.partition(":")
    repo_name, _, revision = repo_name.partition("@")
    if not is_repo_id(repo := f"{owner}/{repo_name}") or any(
        word and not _WORD.fullmatch(word) for word in (tag, revision)
    ):
        return None
    if name.endswith((":", "@")):
        return None
    return HubName(repo, revision or None, None if tag in ("", "latest") else tag)


def _of_path(repo: str, path: str) -> HubName | None:
    """What follows a repository in a link to one of its pages."""
    kind, _, rest = path.partition("/")
    revision, _, file = rest.partition("/")
    if not is_repo_id(repo) or kind not in ("tree", "blob", "resolve") or not _WORD.fullmatch(revision):
        return None
    if kind == "tree":
        return None if file else HubName(repo, revision)
    plain = file and all(part and part[0] != "." for part in file.split("/")) and "\\" not in file
    return HubName(repo, revision, file=file) if plain else None


def choose(name: HubName, files: Iterable[str]) -> str:
    """The GGUF of a repository that a name means: the first part, where it is in several.

    Raises:
        WeightsError: if there is none of that quantization, or several and the name does not say which.
    """
    found = gguf_parts.models(file for file in files if file.lower().endswith(".gguf"))
    fitting = found if name.tag is None else [file for file in found if _is_of(file, name.tag)]
    if len(fitting) > 1 and name.tag is not None:  # `it-Q4_0.gguf` beside `it-qat-Q4_0.gguf`: the plainest
        shortest = min(map(len, fitting))
        fitting = [file for file in fitting if len(file) == shortest]
    if len(fitting) == 1:
        return fitting[0]
    repo = str(HubName(name.repo, name.revision))
    if not found:
        raise WeightsError(f"{repo} holds no GGUF of a model")
    tags = sorted({_tag_of(file) for file in found})
    shown = ", ".join(f"{repo}:{tag}" for tag in tags[:12]) + (", ..." if len(tags) > 12 else "")
    if name.tag is None:
        raise WeightsError(f"{repo} holds {len(found)} GGUF files; name one by its quantization: {shown}")
    which = f"{len(fitting)} GGUF files" if fitting else "no GGUF file"
    raise WeightsError(f"{repo} holds {which} of the quantization {name.tag}; there are: {shown}")


def _is_of(file: str, tag: str) -> bool:
    """Whether a file, or its folder, is called after a quantization."""
    names = [_PART_OF_NAME.sub("", file.rsplit("/", 1)[-1][: -len(".gguf")]), *file.split("/")[:-1]]
    return any(re.search(rf"(^|[-._]){re.escape(tag)}$", name, re.IGNORECASE) for name in names)


def _tag_of(file: str) -> str:
    """What a file would be named by: the quantization at its end, or all of its name."""
    stem = _PART_OF_NAME.sub("", file.rsplit("/", 1)[-1][: -len(".gguf")])
    found = re.search(r"(UD-)?(I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*)$", stem, re.IGNORECASE)
    return found[0] if found else stem
