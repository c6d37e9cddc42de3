"""Preprocessing against the published image processor, on photographs and on shapes that are hard to resize.

Oracles: the processor of PaliGemma in Transformers on Pillow, which is exact, and torch's own resize of bytes, which is
what the same processor uses where torchvision is installed.
"""

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, SiglipImageProcessorPil

from gemkit.family import Modality, Pixels, Vision
from gemkit.images import Picture, preprocess, read
from gemkit.weights.config_vision import pixels_from_hf, preprocessor_to_hf
from gemkit.weights.describe import with_pixels
from support.photographs import FOLDER, NAMES

SIZES = [224, 448]
STEP = 2 / 255  # one level of 8 bits, on the scale of -1 to 1


def published(image, size: int) -> np.ndarray:
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    return processor(image, return_tensors="np")["pixel_values"][0]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_photograph_becomes_the_published_numbers(name, size):
    """The same bits: both resize with Pillow to 8 bits, and scale each level by the same roundings."""
    with PIL.Image.open(FOLDER / name) as image:
        np.testing.assert_array_equal(preprocess(read(FOLDER / name), size), published(image, size))


@pytest.mark.parametrize("size", [1, *SIZES, 896])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 999), (3, 2), (13, 1500), (1500, 13), (224, 448)])
def test_a_picture_of_an_odd_shape_becomes_the_published_numbers(shape, size):
    pixels = noise(*shape)
    np.testing.assert_array_equal(preprocess(read(pixels), size), published(PIL.Image.fromarray(pixels), size))


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP"])
def test_transparency_becomes_the_published_numbers(format):
    """Half transparent pixels too, where the format has them."""
    rgba = np.concatenate([noise(40, 30), noise(30, 40).transpose(1, 0, 2)[:, :, :1]], axis=2)
    file = io.BytesIO()
    PIL.Image.fromarray(rgba).save(file, format, **({"lossless": True} if format == "WEBP" else {}))
    with PIL.Image.open(file) as image:
        np.testing.assert_array_equal(preprocess(read(file.getvalue()), 224), published(image, 224))
    if format != "GIF":
        # of arrays the processor mixes the colours in float64, Pillow in integers: a level apart before resizing
        difference = np.abs(preprocess(read(rgba), 40) - published(rgba, 40))
        assert difference.max() <= 2 * STEP + 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_torchs_resize_is_a_few_levels_away(size):
    """Both filters are the same polynomial; theirs has coefficients of 16 bits, ours of 22, and each rounds twice."""
    for name in NAMES:
        picture = read(FOLDER / name)
        x_1CHW = torch.tensor(picture.pixels).permute(2, 0, 1)[None]
        theirs = torch.nn.functional.interpolate(x_1CHW, (size, size), mode="bicubic", antialias=True)[0]
        difference = np.abs(preprocess(picture, size) - (theirs.numpy() / 127.5 - 1))
        assert difference.max() <= 2 * STEP + 1e-6, name
        assert difference.mean() <= 0.1 * STEP, name


@pytest.mark.parametrize("size", SIZES)
def test_tensorflows_bilinear_is_torchs_without_antialias(size):
    """The same levels, cut to 8 bits, but for values next to a whole number, which a hair decides: a place is known to
    2**-14 of a pixel on the longest side here, and a level lasts at least 1/255 of one."""
    pictures = [read(FOLDER / name) for name in NAMES]
    pictures += [Picture(noise(*shape)) for shape in [(1, 1), (1, 7), (7, 1), (1, 999), (13, 1500), (500, 3)]]
    for picture in pictures:
        x_1CHW = torch.tensor(picture.pixels).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(x_1CHW, (size, size), mode="bilinear", align_corners=False)
        ours = np.round((preprocess(picture, size, Pixels(resample="tensorflow")) + 1) * 127.5)
        theirs = resized[0].numpy()
        cut = np.floor(theirs)
        undecided = np.abs(theirs - np.round(theirs)) < 255 * 2**-14
        assert np.abs(ours - cut).max() <= 1, picture
        np.testing.assert_array_equal(ours[~undecided], cut[~undecided], str(picture))


VISION = Modality(Vision(56, patch_size=14, width=36, depth=1, num_heads=2, mlp_width=44), placeholder=9)
SETTINGS = {
    "as released": {},
    "ImageNet": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "one number": {"image_mean": 0.4, "image_std": 0.3},
    "not normalized": {"do_normalize": False},
    "not rescaled": {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    "rescaled by half": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "nothing": {"do_rescale": False, "do_normalize": False},
    "null": {"do_convert_rgb": None, "do_rescale": None, "do_normalize": None},
    "absent": dict.fromkeys(("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean"), ...),
    **{f"filter {number}": {"resample": number} for number in range(6)},
}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_folder_give_the_published_numbers(name, nested, tmp_path):
    settings = {k: v for k, v in {**preprocessor_to_hf(VISION), **SETTINGS[name]}.items() if v is not ...}
    file = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / file).write_text(json.dumps({"image_processor": settings} if nested else settings))
    if nested:  # it comes first
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 0, "image_mean": 0.1}))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    vision, notes = with_pixels(VISION, tmp_path)
    picture = noise(70, 41)
    found = preprocess(read(picture), 56, vision.pixels)
    wanted = theirs(PIL.Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    assert notes == []
    np.testing.assert_array_equal(found, wanted.astype(np.float32))

    again, _ = pixels_from_hf(preprocessor_to_hf(vision), vision, "saved")
    np.testing.assert_array_equal(preprocess(read(picture), 56, again), found)
