"""Results of an executor as one array, for tests that compare whole matrices."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemkit.executors.interface import Chunk


def dense(executor: Any, chunks: Sequence[Chunk], state: Any, **options: Any) -> np.ndarray:
    """(R, V) or (R, D): `executor.run` of chunks that all give dense rows, at least one."""
    return np.stack(executor.run(chunks, state, **options).rows)
