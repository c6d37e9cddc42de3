"""Drawing: which pixels change, where labels stand, and that no label is too strange."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gemkit.errors import ImageError, MissingExtraError
from gemkit.images import overlay as module
from gemkit.images.overlay import COLORS, MASK_OPACITY, label_colors, overlay, save

GRAY = 119


def gray(width, height):
    return np.full((height, width, 3), GRAY, np.uint8)


def drawn(pixels, *args, **kwargs):
    return np.asarray(overlay(pixels, *args, **kwargs))


def changed(image):
    return (image != GRAY).any(-1)


def bounds(mask):
    """(left, top, right, bottom) around what is True."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (1600, 200), (200, 1600), (224, 224), (31, 17)])
@pytest.mark.parametrize(
    "fractions", [(0.25, 0.3, 0.75, 0.9), (0, 0, 1, 1), (0, 0.5, 0.4, 1), (0.6, 0, 1, 0.3)], ids=str
)
def test_the_outermost_pixels_of_a_frame_are_the_boxs(width, height, fractions):
    box = np.multiply(fractions, (width, height, width, height))
    left, top, right, bottom = (int(edge + 0.5) for edge in box)
    image = drawn(gray(width, height), [("", box)])
    color = label_colors([""])[""]
    assert bounds(changed(image)) == (left, top, right, bottom)
    for edge in (
        image[top, left:right],
        image[bottom - 1, left:right],
        image[top:bottom, left],
        image[top:bottom, right - 1],
    ):
        assert (edge == color).all()
    line = max(1, round((width * height) ** 0.5 / 220))
    assert not changed(image[top + line : bottom - line, left + line : right - line]).any()  # hollow
    assert (image[top + line - 1, left + line : right - line] == color).all()


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((7, 5, 8, 6), (7, 5, 8, 6)),
        ((7.2, 5.1, 7.3, 5.4), (7, 5, 8, 6)),  # narrower than a pixel
        ((7.7, 5.9, 7.8, 5.9), (7, 5, 8, 6)),
        ((0, 0, 0, 0), (0, 0, 1, 1)),
        ((40, 30, 40, 30), (39, 29, 40, 30)),
        ((39.9, 29.9, 40, 30), (39, 29, 40, 30)),
        ((0, 4, 40, 5), (0, 4, 40, 5)),
        ((3, 0, 5, 30), (3, 0, 5, 30)),
        ((-9, -9, 99, 10), (0, 0, 40, 10)),
        ((3.5, 4.5, 8.49, 9.49), (4, 5, 8, 9)),
    ],
)
def test_small_boxes_and_boxes_at_the_border(box, pixels):
    assert bounds(changed(drawn(gray(40, 30), [("", box)]))) == pixels


def test_nothing_is_drawn_of_a_box_outside():
    for box in [(50, 0, 60, 10), (-20, 0, -10, 10), (0, 31, 40, 32)]:
        assert not changed(drawn(gray(40, 30), [("cat", box)])).any()


def test_small_frames_are_over_large_ones():
    small, large = " ", "  "  # blank labels have colours, but no plates to cover anything
    image = drawn(gray(100, 100), [(small, (0, 0, 10, 10)), (large, (0, 0, 100, 100))])
    colors = label_colors([small, large])
    assert colors[small] != colors[large]
    assert (image[9, :10] == colors[small]).all()
    assert (image[99, :] == colors[large]).all()


def test_the_picture_itself_is_left_as_it_is():
    pixels = gray(64, 64)
    drawn(pixels, [("cat", (0, 0, 64, 64))], [np.ones((64, 64), bool)])
    assert not changed(pixels).any()
    assert not changed(drawn(pixels, [])).any()


# ---------------------------------------------------------------- masks


def test_a_mask_tints_its_pixels_and_has_an_outline():
    mask = np.zeros((50, 60), bool)
    mask[10:30, 20:50] = True
    mask[15:20, 30:40] = False  # a hole
    image = drawn(gray(60, 50), [("", (0, 0, 1, 1)), ("", (0, 49, 1, 50))], [mask, None])
    color = np.array(label_colors([""])[""])
    tinted = np.rint(GRAY * (1 - MASK_OPACITY) + color * MASK_OPACITY)
    painted = changed(image)
    painted[0, 0] = painted[49, 0] = False  # the boxes
    np.testing.assert_array_equal(painted, mask)
    assert (image[10, 20:50] == color).all()
    assert (image[14, 30:40] == color).all()  # around the hole
    assert (np.abs(image[12, 22:48] - tinted) <= 1).all()  # Pillow rounds down where it blends


def test_a_mask_of_the_whole_picture_has_no_outline():
    image = drawn(gray(60, 50), [("", (0, 0, 1, 1))], [np.ones((50, 60), bool)])
    assert len(np.unique(image[1:].reshape(-1, 3), axis=0)) == 1


# ---------------------------------------------------------------- colours


def test_labels_keep_their_colour_and_differ():
    names = ["cat", "dog", "person", "bicycle", "traffic light", "猫", "", "a", "b", "c", "d", "e"]
    together = label_colors(names)
    assert together == label_colors(reversed(names))
    assert len(set(together.values())) == len(names) == len(COLORS)
    for name in ("cat", "dog", "person"):  # alone as in company
        assert label_colors([name])[name] == label_colors(["cat", "dog", "person"])[name]
    assert len(label_colors([*names, "one more"])) == 13
    assert label_colors(["cat", "cat"]) == label_colors(["cat"])


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("width", "height"), [(640, 480), (224, 224), (100, 30), (30, 100), (2000, 60), (20, 20), (1, 1), (9, 400)]
)
@pytest.mark.parametrize("label", ["cat", "a sleeping cat on a windowsill " * 9, "W" * 5000])
def test_labels_stay_in_the_picture(width, height, label):
    """Boxes at every corner: where there is room for a line of text, a plate is drawn whole, letters and all."""
    for left, top in [(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)]:
        image = drawn(gray(width, height), [(label, (left, top, left + 1, top + 1))])
        assert image.shape == (height, width, 3)
        assert changed(image).any()
        if min(width, height) >= 30:
            plate_left, plate_top, plate_right, plate_bottom = bounds(changed(image))
            assert plate_right - plate_left > 8
            assert plate_bottom - plate_top > 8


def test_a_plate_is_above_its_box_or_in_it():
    above = drawn(gray(640, 480), [("cat", (100, 200, 300, 400))])
    assert bounds(changed(above))[0] == 100
    assert changed(above)[199, 100]
    inside = drawn(gray(640, 480), [("dog", (400, 2, 600, 300))])
    assert bounds(changed(inside)) == (400, 2, 600, 300)


def test_a_label_is_written_in_black_or_white_on_its_colour():
    for label in ("cat", "dog", "bird", "car"):
        image = drawn(gray(640, 480), [(label, (300, 300, 301, 301))])
        color = label_colors([label])[label]
        ink = 0 if np.dot(color, (0.299, 0.587, 0.114)) > 140 else 255
        left, top, right, bottom = bounds(changed(image))
        plate = image[top : bottom - 1, left:right]
        assert (plate == color).all(-1).mean() > 0.4
        assert (plate == ink).all(-1).any()
        border = np.concatenate([plate[0], plate[-1], plate[:, 0], plate[:, -1]])
        assert (border == color).all()  # the letters do not touch the plate's edge


STRANGE = [
    "黒い猫",
    "🐈‍⬛",
    "\ud800",
    "a\0b",
    "a\nb\tc",
    "\u202eright to left",
    "e\u0301" * 50,
    "قطة",
    "\uffff",
    "  ",
    ";",
]


@pytest.mark.parametrize("label", STRANGE)
def test_strange_labels_are_drawn_somehow(label):
    image = drawn(gray(300, 200), [(label, (100, 100, 200, 150))])
    assert bounds(changed(image))[3] == 150
    assert changed(image)[149, 100:200].all()


@settings(max_examples=50)
@given(st.text(), st.integers(1, 80), st.integers(1, 80))
def test_no_label_is_an_error(label, width, height):
    assert overlay(gray(width, height), [(label, (0, 0, width, height))]).size == (width, height)


def test_labels_beyond_ascii_are_written_in_a_font_of_the_system(monkeypatch):
    """The first of `FONTS` that opens; where there is none, Pillow's own."""
    other = module._font_for("cat", 20)
    monkeypatch.setattr(module, "_font", lambda name, size: other if name == module.FONTS[1] else None)
    assert module._font_for("黒い猫", 20) is other
    monkeypatch.setattr(module, "FONTS", ())
    assert module._font_for("黒い猫", 20).getname() == other.getname()


def test_a_font_of_ones_own(tmp_path):
    file = tmp_path / "own.ttf"
    file.write_bytes(module._font_for("cat", 10).font_bytes)
    assert changed(drawn(gray(100, 100), [("été", (0, 50, 90, 90))], font=file))[:50].any()
    with pytest.raises(ImageError, match=r"the font .*none\.ttf cannot be opened"):
        overlay(gray(100, 100), [("cat", (0, 50, 90, 90))], font=tmp_path / "none.ttf")


# ---------------------------------------------------------------- files and errors


def test_files_are_png_whatever_their_name(tmp_path):
    image = overlay(gray(64, 48), [("cat", (10, 20, 30, 40))])
    save(image, tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
    with pytest.raises(ImageError, match="cannot write"):
        save(image, tmp_path / "no such folder" / "out.png")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.zeros((4, 4), np.uint8), []), r"not \(4, 4\) of uint8"),
        ((np.zeros((4, 4, 4), np.uint8), []), r"not \(4, 4, 4\)"),
        ((np.zeros((0, 4, 3), np.uint8), []), r"not \(0, 4, 3\)"),
        ((np.zeros((4, 4, 3)), []), "of float64"),
        ((gray(4, 4), [("cat", (0, 0, 1))]), "the box of 'cat' is"),
        ((gray(4, 4), [("cat", (3, 0, 1, 2))]), "need left <= right"),
        ((gray(4, 4), [("cat", (0, 0, 1, float("nan")))]), "the box of 'cat' is"),
        ((gray(4, 4), [("cat", (0, 0, 1, 1))], []), "0 masks for 1 places"),
        ((gray(4, 4), [("cat", (0, 0, 1, 1))], [np.zeros((4, 5), bool)]), r"the mask of 'cat' is \(4, 5\) of bool"),
        ((gray(4, 4), [("cat", (0, 0, 1, 1))], [np.zeros((4, 4))]), "of float64; need"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(args, message):
    with pytest.raises(ImageError, match=message):
        overlay(*args)


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"drawing needs the extra \[vision\]"):
        overlay(gray(4, 4), [])
