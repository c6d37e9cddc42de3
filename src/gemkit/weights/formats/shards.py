"""The index of a checkpoint that is spread over several files: `*.index.json`, the same for safetensors and torch.

    {"metadata": {...}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors", ...}}

An index is data from afar: its file names are used only where they are plain names of files in its own folder.
"""

from __future__ import annotations

from pathlib import Path

from gemkit.errors import WeightsError
from gemkit.weights.formats.base import MAX_HEADER, File, parse_json


def read_index(path: Path) -> dict[Path, set[str]]:
    """Each shard that an index names, with the tensors it should hold.

    Raises:
        WeightsError: if the index is malformed, names a file outside its folder, or a shard is missing.
    """
    file = File(path)
    try:
        if file.size > MAX_HEADER:
            raise WeightsError(f"{path} is {file.size:,} bytes: no index is larger than {MAX_HEADER:,}")
        weight_map = parse_json(file.read(file.size, 0), str(path)).get("weight_map")
    finally:
        file.close()
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map: it is not the index of a checkpoint")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise WeightsError(
                f"{path}: {name!r} is said to be in {shard!r}, which is not the name of a file beside it"
            )
        shards.setdefault(shard, set()).add(name)
    missing = sorted(shard for shard in shards if not (path.parent / shard).exists())
    if missing:
        there = len(shards) - len(missing)
        raise WeightsError(
            f"{path.parent}: incomplete download: {there} of {len(shards)} shards; missing: {', '.join(missing[:4])}"
        )
    for shard in shards:
        _check_inside(path.parent, shard)
    return {path.parent / shard: names for shard, names in sorted(shards.items())}


def check_shard(path: Path, promised: set[str], found: set[str]) -> None:
    """Raises: WeightsError, where a shard does not hold exactly what its index promises."""
    if absent := sorted(promised - found):
        raise WeightsError(f"{path}: {len(absent)} tensors of the index are not in this shard, first {absent[0]!r}")
    if extra := sorted(found - promised):
        raise WeightsError(
            f"{path}: {len(extra)} tensors are not in the index or are promised by another shard, "
            f"first {extra[0]!r}: a stale index?"
        )


def _is_plain(name: str) -> bool:
    """A file's name and nothing else, on every system: no separators, drives, parents or hidden files."""
    return bool(name) and len(name) < 256 and name[0] != "." and not any(c in '/\\:%"<>|?*' or c < " " for c in name)


def _check_inside(folder: Path, name: str) -> None:
    """A link may lead out of the folder only as Hugging Face's cache does: snapshots/<commit>/x -> blobs/<hash>."""
    real, home = (folder / name).resolve(), folder.resolve()
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if real.parent != home and not in_cache:
        raise WeightsError(f"{folder / name} is a link out of its folder, to {real}: copy the file into the folder")
