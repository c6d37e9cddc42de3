"""GGUF in several files: `NAME-00001-of-00003.gguf` and so on, as llama-gguf-split and llama.cpp's converter write.

The first file has the metadata of the whole; each says in `split.no` and `split.count` which it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemkit.errors import WeightsError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """All files of the GGUF of which `path` is one, in order.

    Args:
        metadata: those of `path`.

    Raises:
        WeightsError: if a part is missing, or the name of this one does not lead to the others.
    """
    number, count = split_of(path, metadata)
    if count == 1:
        return [path]
    found = _PART.fullmatch(path.name)
    if found is None or (int(found["number"]), int(found["count"])) != (number + 1, count):
        raise WeightsError(
            f"{path} is part {number + 1} of {count} of a GGUF, and its name does not say so: name the parts "
            f"NAME-{1:05}-of-{count:05}.gguf and so on, in one folder"
        )
    files = [path.with_name(f"{found['stem']}-{i + 1:05}-of-{found['count']}{path.suffix}") for i in range(count)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise WeightsError(
            f"{path.parent}: {len(missing)} of {count} parts of this GGUF are missing: {', '.join(missing[:4])}: "
            "an incomplete download? All parts are needed, in one folder"
        )
    return files


def split_of(path: Path, metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Number of a part, from 0, and of how many. Raises: WeightsError, if these are no such numbers."""
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 1)
    if type(number) is not int or type(count) is not int or not 0 <= number < max(count, 1) <= 99_999:
        raise WeightsError(f"{path}: split.no={number!r} and split.count={count!r} are no part of a GGUF")
    return number, max(count, 1)  # 0: llama.cpp's converter on a model that fits one file


def in_folder(folder: Path) -> Path:
    """The one model among the GGUF files of a folder, by its first part. Image towers beside it (mmproj) are no models.

    Raises:
        WeightsError: if there are several, or none.
    """
    names = models(file.name for file in folder.glob("*.gguf"))
    if len(names) == 1:
        return folder / names[0]
    if names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise WeightsError(f"{folder} holds {len(names)} GGUF models: name one of these files: {shown}")
    raise WeightsError(f"{folder} holds no GGUF of a model")


def models(names: Any) -> list[str]:
    """The names of GGUF files without further parts and image towers, sorted; paths in a repository are names too."""
    found = []
    for name in names:
        file = name.rsplit("/", 1)[-1]
        part = _PART.fullmatch(file)
        if not is_tower(file) and (part is None or int(part["number"]) == 1):
            found.append(name)
    return sorted(found)


def is_tower(name: str) -> bool:
    """Whether a file is called as llama.cpp calls the image tower of a model."""
    return "mmproj" in name.lower()


def together(name: str) -> str:
    """A pattern of file names that matches this file, and if it is a part all others of its GGUF."""
    found = _PART.fullmatch(name)
    return name if found is None else f"{found['stem']}-?????-of-{found['count']}{name[-5:]}"
