"""A ragged batch: sequences laid end to end, and boundaries that cannot be."""

import pytest
import torch
from torch.utils import _pytree

from gemkit.errors import ConfigError
from gemkit.nn import Batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one sequence"),
        (([[1], []],), "at least one token"),
        (([[1]], {"offsets": [0, 1]}), "must agree"),
        (([[1], [2]], {"slots": [3, 3]}), "must differ"),
        (([[1]], {"offsets": [-1]}), "0 or more"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    sequences, options = (*arguments, {})[:2]
    with pytest.raises(ConfigError, match=message):
        Batch.of(sequences, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": [0, 2, 1, 3]}, r"starts=\[0, 2, 1, 3\] must rise from 0 to the number of tokens, 3"),
        ({"starts": [0, 1, 1, 3]}, "must rise"),
        ({"starts": [1, 2, 3]}, "must rise from 0"),
        ({"starts": [0, 1, 2]}, "number of tokens, 3"),
        ({"starts": [0]}, "must rise"),
        ({"starts": [0, 3]}, "1 sequences, but 3 positions, 2 offsets and 2 slots"),
        ({"positions": [0, 1]}, "2 positions"),
        ({"spans": [[1, 3]]}, r"spans=\[\[1, 3\]\] are cut by the borders of sequences \[0, 2, 3\]"),
        ({"spans": [[0, 1], [1, 3]]}, "are cut by the borders"),
        ({"spans": [[2, 4]]}, r"spans=\[\[2, 4\]\] must be rows of the 3, ascending and disjoint"),
        ({"spans": [[-1, 1]]}, "ascending and disjoint"),
        ({"spans": [[1, 1]]}, "ascending and disjoint"),
        ({"spans": [[0, 2], [1, 2]]}, "ascending and disjoint"),
        ({"spans": [[2, 3], [0, 1]]}, "ascending and disjoint"),
    ],
)
def test_boundaries_that_cannot_be(change, message):
    fields = {"tokens": [7, 8, 9], "positions": [0, 1, 0], "starts": [0, 2, 3]}
    fields |= {"offsets": [0, 0], "slots": [0, 1], "spans": [], "image_rows": [], **change}
    with pytest.raises(ConfigError, match=message):
        Batch(**{name: torch.tensor(values) for name, values in fields.items()})


def test_a_batch_lays_sequences_end_to_end():
    batch = Batch.of([[7, 8, 9], [5]], offsets=[0, 4], slots=[2, 0])
    assert batch.tokens.tolist() == [7, 8, 9, 5]
    assert batch.positions.tolist() == [0, 1, 2, 4]
    assert list(batch.sequences()) == [(0, 3, 2, 0), (3, 4, 0, 4)]
    assert len(batch) == 4


def test_spans_are_rows_of_all_sequences():
    batch = Batch.of([[7, 8, 9], [5, 6]], offsets=[4, 0], spans=[(0, 2), (3, 5)])
    assert batch.span_rows() == [(0, 2), (3, 5)]
    assert Batch.of([[7]]).span_rows() == []
    with pytest.raises(
        ConfigError, match=r"spans=\[\[0, 2\], \[3, 5\]\]: a recurrent layer cannot see what comes after"
    ):
        batch.expect_causal()
    Batch.of([[7]]).expect_causal()


def test_a_batch_is_a_tree_of_tensors():
    """So that a compiled function takes other boundaries, spans among them, as data."""
    leaves, shape = _pytree.tree_flatten(Batch.of([[7, 8, 9]], spans=[(0, 2)]))
    assert len(leaves) == 7
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = _pytree.tree_unflatten(leaves, shape)
    assert again.span_rows() == [(0, 2)]
