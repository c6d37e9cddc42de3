"""COCO's boxes and run lengths, against pycocotools."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as theirs
from pycocotools.coco import COCO

from gemkit.images import coco

# its compiled part hands NumPy 2 an object whose conversion takes no `copy`
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@st.composite
def masks(draw):
    """Noise, stripes of either direction, and all of one kind; empty ones too."""
    height, width = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0, 0.02, 0.5, 0.98, 1]))
    shape = draw(st.sampled_from([(height, width), (height, 1), (1, width)]))
    return np.broadcast_to(random.random(shape) < share, (height, width))


@given(masks())
def test_run_lengths_are_pycocotools(mask):
    rle = coco.to_rle(mask)
    if mask.size:  # it knows no masks without pixels
        encoded = theirs.encode(np.asfortranarray(mask, np.uint8))
        assert rle == {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
        plain = coco.to_rle(mask, compressed=False)
        assert theirs.frPyObjects(plain, *mask.shape)["counts"] == encoded["counts"]
        np.testing.assert_array_equal(theirs.decode(rle), mask)


def test_runs_go_down_the_columns_and_begin_outside():
    mask = np.array([[1, 0, 0], [1, 0, 1]], bool)
    assert coco.to_rle(mask, compressed=False) == {"size": [2, 3], "counts": [0, 2, 3, 1]}
    assert coco.to_rle(~mask, compressed=False) == {"size": [2, 3], "counts": [2, 3, 1]}


@given(st.lists(st.integers(1, 2**20), max_size=12))
def test_counts_are_compressed_as_pycocotools_does(counts):
    size = [sum(counts), 1]
    assert coco.compress(counts) == theirs.frPyObjects({"size": size, "counts": counts}, *size)["counts"].decode()


def test_large_masks_are_pycocotools_too():
    y, x = np.mgrid[0:2000, 0:3000]
    mask = np.hypot(y - 900, x - 1200) < 800
    assert coco.to_rle(mask)["counts"] == theirs.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


# ---------------------------------------------------------------- annotations

BOX = (10.0, 20.5, 40.0, 60.0)
MASK = np.zeros((80, 100), bool)
MASK[25:55, 12:38] = True


def test_an_annotation():
    bare = coco.annotation("chat noir", BOX)
    assert bare == {"category": "chat noir", "bbox": [10.0, 20.5, 30.0, 39.5], "area": 30.0 * 39.5}
    masked = json.loads(json.dumps(coco.annotation("cat", np.array(BOX, np.float32), MASK)))
    assert masked["area"] == 30 * 26 == theirs.area(masked["segmentation"])
    np.testing.assert_array_equal(theirs.decode(masked["segmentation"]), MASK)


def test_pycocotools_reads_annotations(tmp_path):
    """A document of them, as a data set of COCO has it."""
    entries = []
    for number, (label, mask) in enumerate([("cat", MASK), ("dog", None)], 1):
        entry = coco.annotation(label, BOX, mask)
        entry |= {"id": number, "image_id": 1, "category_id": number, "iscrowd": int(mask is not None)}
        entries.append(entry)
    path = tmp_path / "places.json"
    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": entries}))
    with contextlib.redirect_stdout(io.StringIO()):
        read = COCO(path)
    found = read.loadAnns(read.getAnnIds(imgIds=[1]))
    assert [entry["category"] for entry in found] == ["cat", "dog"]
    np.testing.assert_array_equal(read.annToMask(found[0]), MASK)
