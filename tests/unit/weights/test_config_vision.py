"""Image towers in the configurations of PaliGemma, both ways."""

import pytest

from gemkit import family
from gemkit.errors import ConfigError, WeightsError
from gemkit.family import Pixels
from gemkit.weights.config_hf import to_hf
from gemkit.weights.config_vision import pixels_from_hf, preprocessor_to_hf, vision_from_hf

MEMBERS = [m.name for m in family.members() if m.vision is not None]


@pytest.mark.parametrize("name", MEMBERS)
def test_towers_are_written_and_read(name):
    member = family.get(name)
    assert vision_from_hf(to_hf(member.decoder, member.vision), name) == member.vision


def test_a_configuration_of_text_has_no_tower():
    assert vision_from_hf(to_hf(family.get("gemma-2-2b").decoder), "x") is None
    assert vision_from_hf({"model_type": "gemma3", "vision_config": {}}, "x") is None


def test_a_decoder_that_no_paligemma_has():
    vision = family.get("paligemma-3b-mix-224").vision
    with pytest.raises(ConfigError, match="has a text decoder of 'gemma3_text'"):
        to_hf(family.get("gemma-3-1b").decoder, vision)


@pytest.mark.parametrize(
    ("section", "change", "error", "message"),
    [
        ("vision_config", {"model_type": "clip"}, ConfigError, "a tower of model_type 'clip'"),
        ("vision_config", {"hidden_act": "relu"}, ConfigError, "hidden_act='relu'"),
        ("vision_config", {"num_channels": 1}, ConfigError, "num_channels=1"),
        ("vision_config", {"hidden_size": "wide"}, WeightsError, "hidden_size='wide' must be a whole number"),
        (None, {"projection_dim": 7}, ConfigError, "projection_dim=7 is not the decoder's"),
        (None, {"image_token_index": 300_000}, ConfigError, "has no row in a vocabulary"),
        (None, {"vision_config": None}, WeightsError, "without a vision_config"),
    ],
)
def test_other_towers_are_refused(section, change, error, message):
    member = family.get("paligemma-3b-mix-224")
    config = to_hf(member.decoder, member.vision)
    config = {**config, **change} if section is None else {**config, section: {**config[section], **change}}
    with pytest.raises(error, match=message):
        vision_from_hf(config, "config.json")


@pytest.mark.parametrize("size", [224, 448])
def test_the_preprocessor_is_that_of_the_released_models(size):
    settings = preprocessor_to_hf(family.get(f"paligemma-3b-mix-{size}").vision)
    assert settings["size"] == {"height": size, "width": size}
    assert settings["image_seq_length"] == (size // 14) ** 2
    assert (settings["resample"], settings["image_mean"], settings["image_std"]) == (3, [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 224}}, "does not fit the tower"),
        ({"size": 224}, "size=224 does not fit the tower"),
        ({"size": {"height": 448, "width": 448}}, "which takes {'height': 224, 'width': 224} alone"),
        ({"image_seq_length": 1024}, "image_seq_length=1024, and the tower makes 256"),
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not implemented"),
        ({"resample": 6}, "resample=6 is no filter"),
        ({"image_std": [0.5, 0, 0.5]}, "divides by zero"),
        ({"image_mean": [0.5]}, "one for each of three channels"),
        ({"do_rescale": "no"}, "must be true or false"),
        ({"do_resize": False}, "do_resize=False is not implemented"),
        ({"do_resize": None}, "do_resize=None"),
        ({"resample": None}, "resample=None is no filter"),
        ({"image_mean": None}, "one for each of three channels"),
        ({"rescale_factor": None}, "rescale_factor is missing"),
        ({"do_center_crop": True}, "do_center_crop=True is not implemented"),
    ],
)
def test_pictures_that_cannot_be_prepared_so_are_refused(change, message):
    vision = family.get("paligemma-3b-mix-224").vision
    with pytest.raises((ConfigError, WeightsError), match=message):
        pixels_from_hf({**preprocessor_to_hf(vision), **change}, vision, "x")


def test_a_file_that_says_nothing_is_the_published_one():
    vision = family.get("paligemma-3b-mix-224").vision
    assert pixels_from_hf({}, vision, "x") == (Pixels(), [])
    assert pixels_from_hf({"attention": 1}, vision, "x")[1] == ["x: not known here, and not used: attention"]
