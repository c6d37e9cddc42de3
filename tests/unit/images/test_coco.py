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

from gemkit.errors import ImageError
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
        np.testing.assert_array_equal(theirs.decode(encoded), coco.from_rle(encoded))  # bytes
        plain = coco.to_rle(mask, compressed=False)
        assert theirs.frPyObjects(plain, *mask.shape)["counts"] == encoded["counts"]
    for form in (rle, coco.to_rle(mask, compressed=False)):
        back = coco.from_rle(json.loads(json.dumps(form)))
        np.testing.assert_array_equal(back, mask, strict=True)


def test_runs_go_down_the_columns_and_begin_outside():
    mask = np.array([[1, 0, 0], [1, 0, 1]], bool)
    assert coco.to_rle(mask, compressed=False) == {"size": [2, 3], "counts": [0, 2, 3, 1]}
    assert coco.to_rle(~mask, compressed=False) == {"size": [2, 3], "counts": [2, 3, 1]}


@given(st.lists(st.integers(0, 2**28), max_size=12))
def test_any_counts_survive_compression(counts):
    assert coco.decompress(coco.compress(counts)) == counts


def test_large_masks_are_pycocotools_too():
    y, x = np.mgrid[0:2000, 0:3000]
    mask = np.hypot(y - 900, x - 1200) < 800
    assert coco.to_rle(mask)["counts"] == theirs.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


@given(st.one_of(st.text(max_size=20), st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=20)))
def test_damaged_strings_are_read_or_refused(text):
    with contextlib.suppress(ImageError):
        assert coco.from_rle({"size": [3, 4], "counts": text}).shape == (3, 4)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ([[1, 2, 3, 4, 5, 6]], "polygons is not read"),
        (None, "not None"),
        ({"counts": [1]}, "not None"),
        ({"size": [2], "counts": [2]}, r"not \[2\]"),
        ({"size": [2, 2.0], "counts": [4]}, r"not \[2, 2.0\]"),
        ({"size": [-2, -2], "counts": [4]}, r"not \[-2, -2\]"),
        ({"size": [True, 4], "counts": [4]}, "not"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "of at most 268,435,456 pixels"),
        ({"size": [2, 2]}, "not NoneType"),
        ({"size": [2, 2], "counts": [1, "3"]}, "list of whole numbers"),
        ({"size": [2, 2], "counts": [3]}, "of 2 x 2 add up to 3"),
        ({"size": [2, 2], "counts": [5, -1]}, "or one is negative"),
        ({"size": [2, 2], "counts": "~"}, "'~' is no character"),
        ({"size": [2, 2], "counts": "\x1f"}, "is no character"),
        ({"size": [2, 2], "counts": "o"}, "ends within a number"),
        ({"size": [2, 2], "counts": "o" * 9}, "longer than any picture"),
    ],
)
def test_what_is_no_mask_is_refused(rle, message):
    with pytest.raises(ImageError, match=message):
        coco.from_rle(rle)


# ---------------------------------------------------------------- annotations

BOX = (10.0, 20.5, 40.0, 60.0)
MASK = np.zeros((80, 100), bool)
MASK[25:55, 12:38] = True


def test_an_annotation_and_back():
    bare = coco.annotation("chat noir", BOX)
    assert bare == {"category": "chat noir", "bbox": [10.0, 20.5, 30.0, 39.5], "area": 30.0 * 39.5}
    assert coco.read_annotation(json.loads(json.dumps(bare))) == ("chat noir", BOX, None)
    masked = coco.annotation("cat", np.array(BOX, np.float32), MASK)
    assert masked["area"] == 30 * 26 == theirs.area(masked["segmentation"])
    label, box, mask = coco.read_annotation(json.loads(json.dumps(masked)))
    assert (label, box) == ("cat", BOX)
    np.testing.assert_array_equal(mask, MASK)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"bbox": [0, 0, 1, 1]}, "no category of that name or id: None"),
        ({"bbox": [0, 0, 1, 1], "category_id": 3}, "no category of that name or id: 3"),
        ({"bbox": [0, 0, 1, 1], "category_id": [1]}, r"no category of that name or id: \[1\]"),
        ({"bbox": [0, 0, 1, 1], "category": 3}, "no category of that name or id: 3"),
        ({"category": "cat"}, "'cat': bbox is None"),
        ({"category": "cat", "bbox": [0, 0, 1]}, r"bbox is \[0, 0, 1\]; need \[x, y, width, height\]"),
        ({"category": "cat", "bbox": [0, 0, 1, float("nan")]}, "bbox is"),
        ({"category": "cat", "bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 1]]}, "polygons"),
    ],
)
def test_malformed_annotations_are_refused(found, message):
    with pytest.raises(ImageError, match=message):
        coco.read_annotation(found, {1: "cat"})


def test_pycocotools_reads_a_document(tmp_path):
    things = [("cat", BOX, MASK), ("dog", (0.0, 0.0, 9.0, 8.0), None), ("cat", BOX, None)]
    document = coco.document([("a.jpg", 100, 80, things), ("b.jpg", 5, 4, [])])
    path = tmp_path / "places.json"
    path.write_text(json.dumps(document))
    with contextlib.redirect_stdout(io.StringIO()):
        read = COCO(path)
    assert [image["file_name"] for image in read.loadImgs(read.getImgIds())] == ["a.jpg", "b.jpg"]
    assert [category["name"] for category in read.loadCats(read.getCatIds())] == ["cat", "dog"]
    found = read.loadAnns(read.getAnnIds(imgIds=[1]))
    np.testing.assert_array_equal(read.annToMask(found[0]), MASK)
    categories = {category["id"]: category["name"] for category in document["categories"]}
    for entry, (label, box, mask) in zip(found, things, strict=True):
        got = coco.read_annotation(entry, categories)
        assert got[:2] == (label, box)
        assert (got[2] is None) == (mask is None)
