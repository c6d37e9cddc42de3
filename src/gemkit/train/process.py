"""The process of a run: its rank among others, and the sums over all of them.

Everything that would differ with more than one process asks this object: which share of a step is computed here
(`data.loader.share`), who writes files and speaks (`main`), how many examples a step has in all (`sum`), whether
anybody stops (`any`). One process is rank 0 of 1, and every sum is its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Process:
    """One process of a run, by the words of `torch.distributed`."""

    rank: int = 0
    world: int = 1  # processes in all
    device: torch.device | str = "cpu"  # of the model in this process

    @property
    def main(self) -> bool:
        """True of the one that writes checkpoints and log, holds the lock of the folder, and speaks."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum of a number over all processes, each of which must call this."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item()

    def any(self, flag: bool) -> bool:
        """True if the flag is set in one of the processes, each of which must call this."""
        return self.sum(float(flag)) > 0
