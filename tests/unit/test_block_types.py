"""One table of block types: the C++ kernels number and lay them out as it does."""

import re
from pathlib import Path

import pytest

from gemkit.block_types import KINDS, PLANES
from gemkit.executors.native import packfile

CSRC = Path(__file__).parents[2] / "csrc"


def test_the_kernels_number_the_kinds_as_packed_files_do():
    body = re.search(r"enum Kind : int32_t \{[^\n]*\n(.*?)\};", (CSRC / "kernels" / "table.h").read_text(), re.S)
    assert body
    numbers = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", body[1])}
    assert numbers.pop("KINDS") == len(packfile.KINDS)
    ours = {"float32": "F32", "bfloat16": "BF16"}
    assert numbers == {ours.get(name, name): number for number, name in enumerate(packfile.KINDS)}


def test_the_kernels_decode_the_kinds_as_they_are_defined():
    rows = re.findall(r"case (Q\w+): return \{(.*?)\};", (CSRC / "weights.h").read_text())
    found = {}
    for name, fields in rows:
        low, high, group, zero, minima, superblock = ({"true": 1, "false": 0}.get(f, f) for f in fields.split(", "))
        found[name] = tuple(map(int, (low, high, group, zero, minima, superblock)))
    assert found == {
        kind.name: (*(*kind.bits, 0)[:2], kind.group, kind.zero, int(kind.minima), int(kind.superblock is not None))
        for kind in KINDS.values()
    }


def test_the_planes_are_passed_to_the_kernels_in_order():
    body = re.search(r"struct Planes \{\s*void \*(.*?);", (CSRC / "weights.h").read_text(), re.S)
    assert body
    assert tuple(re.findall(r"\w+", body[1])) == PLANES


# codes, then a float16 for 32; with superblocks a byte for each 16 or 32 and float16 for 256, all planes counted
BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q8_0": 8.5, "Q2_K": 3.125, "Q4_K": 4.625, "Q6_K": 6.5625}


@pytest.mark.parametrize(("name", "bits"), BITS.items())
def test_bits_of_a_weight(name, bits):
    assert KINDS[name].bits_per_weight == bits
