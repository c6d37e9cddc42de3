"""Several processes of `torch.distributed` on this machine, which run the checks of a test file together.

A file's checks are its functions `check_...`. All of a file run in one group, started once: starting costs seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def run(file: str, world: int, folder: Path) -> dict[str, str]:
    """What went wrong in each check of a test file, "" where nothing did, by its name."""
    code = [sys.executable, "-m", "support.ranks", file, str(world), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "w") as output:
        ranks = [
            subprocess.Popen([*code, str(rank)], env=environment, stdout=output, stderr=output) for rank in range(world)
        ]
        for rank in ranks:
            rank.wait(500)
    found: dict[str, str] = {}
    for rank in range(world):
        path = folder / f"{rank}.json"
        if not path.exists():
            raise AssertionError(f"rank {rank} ended early:\n{(folder / 'output').read_text()[-4000:]}")
        for name, error in json.loads(path.read_text()).items():
            found[name] = found.get(name, "") + (f"rank {rank}: {error}\n" if error else "")
    return found


def checks(module: Any) -> list[str]:
    return [name for name in vars(module) if name.startswith("check_")]


def _main(file: str, world: int, folder: Path, rank: int) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    spec = importlib.util.spec_from_file_location("checked", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for name in checks(module):
        try:
            getattr(module, name)(folder)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
