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
    text = (CSRC / "weights.h").read_text()
    rows = re.findall(r"case (I?Q\w+): return \{(.*?)\};", text)
    lists = re.findall(r"int8_t (\w+)\[16\] = \{(.*?)\};", text)
    values = {name: tuple(map(int, numbers.split(", "))) for name, numbers in lists}
    found = {}
    for name, fields in rows:
        parts = fields.split(", ")
        *numbers, book, unit = parts + ["", "1f"][len(parts) - 6 :]
        counts = tuple(int({"true": 1, "false": 0}.get(number, number)) for number in numbers)
        found[name] = counts, values.get(book), float(unit.rstrip("f"))
    assert found == {
        kind.name: (
            (*(*kind.bits, 0)[:2], kind.group, kind.zero, int(kind.minima), int(kind.superblock is not None)),
            kind.values,
            kind.unit,
        )
        for kind in KINDS.values()
    }


def test_the_planes_are_passed_to_the_kernels_in_order():
    body = re.search(r"struct Planes \{\s*void \*(.*?);", (CSRC / "weights.h").read_text(), re.S)
    assert body
    assert tuple(re.findall(r"\w+", body[1])) == PLANES


# codes, then a float16 for 32; with superblocks a byte for each 16 or 32 and float16 for 256, all planes counted
BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q8_0": 8.5, "Q2_K": 3.125, "Q4_K": 4.625, "Q6_K": 6.5625}
BITS |= {"IQ4_NL": 4.5, "IQ4_XS": 4.3125, "IQ3_S": 4.3125, "IQ2_XXS": 3.3125, "IQ2_S": 3.5625, "IQ1_M": 3.5625}


@pytest.mark.parametrize(("name", "bits"), BITS.items())
def test_bits_of_a_weight(name, bits):
    assert KINDS[name].bits_per_weight == bits
