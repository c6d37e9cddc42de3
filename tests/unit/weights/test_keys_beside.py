"""Files as published and as Transformers writes them, against the tables of keys."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig, PaliGemmaProcessor
from transformers.models.siglip import image_processing_pil_siglip as siglip

from gemkit.errors import ConfigError
from gemkit.weights.keys_beside import GENERATION, PREPROCESSOR, PROCESSOR, TOKENIZER, TOKENIZER_JSON
from gemkit.weights.known_keys import check_keys
from support.foreign_templates import write_json
from support.tiny_models import tokenizer
from support.vocabularies import tokenizer_json

ADDED = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
# The keys of the released files and of those that training tools leave, with values that bear on a rule of the table.
PUBLISHED = {
    "generation gemma-2b": (GENERATION, {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 0, "transformers_version": "4.38.0.dev0"}),
    "generation gemma-2-2b-it": (GENERATION, {"_from_model_config": True, "cache_implementation": "hybrid",
        "eos_token_id": [1, 107]}),
    "generation gemma-3-1b-it": (GENERATION, {"cache_implementation": "hybrid", "do_sample": True,
        "eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95}),
    "tokenizer gemma-2b": (TOKENIZER, {"add_bos_token": True, "add_eos_token": False,
        "added_tokens_decoder": {"0": ADDED}, "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "bos_token": "<bos>", "chat_template": "x", "clean_up_tokenization_spaces": False, "eos_token": "<eos>",
        "legacy": None, "model_max_length": 1e30, "pad_token": "<pad>", "sp_model_kwargs": {},
        "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>",
        "use_default_system_prompt": False}),
    "tokenizer gemma-3-1b-it": (TOKENIZER, {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "extra_special_tokens": {"boi_token": "<start_of_image>"}, "image_token": "<image_soft_token>",
        "processor_class": "Gemma3Processor"}),
    "tokenizer of a trainer": (TOKENIZER, {"padding_side": "left", "truncation_side": "left", "max_length": 512,
        "stride": 0, "truncation_strategy": "longest_first", "pad_to_multiple_of": None, "device_map": "auto"}),
    "preprocessor paligemma-3b-pt-224": (PREPROCESSOR, {"do_convert_rgb": None, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": 256, "image_std": [0.5] * 3, "processor_class": "PaliGemmaProcessor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
        "_valid_processor_keys": ["images"]}),
    "preprocessor gemma-3-4b-it": (PREPROCESSOR, {"do_pan_and_scan": None, "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None, "pan_and_scan_min_ratio_to_activate": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_known_whole(name):
    table, values = PUBLISHED[name]
    assert check_keys(values, table, name) == []


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_published_tokenizers_are_known_whole(name):
    folder = tokenizer_json(name).parent
    assert check_keys(json.loads((folder / "tokenizer_config.json").read_text()), TOKENIZER, name) == []


def test_what_transformers_writes_is_known_whole(tmp_path):
    everything = dict.fromkeys(GenerationConfig().to_dict(), 1)
    assert not [note for note in check_keys(everything, GENERATION, "x") if "not known" in note]
    defaults = GenerationConfig()._get_default_generation_params()
    assert all("max_length" in note for note in check_keys(defaults, GENERATION, "x"))  # neutral values are theirs

    tokenizer().with_places().save(tmp_path / "tokenizer.model")
    write_json(tmp_path)
    images = siglip.SiglipImageProcessorPil()
    images.image_seq_length = 16
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    PaliGemmaProcessor(images, theirs, chat_template="x").save_pretrained(tmp_path / "both")
    images.save_pretrained(tmp_path / "both")
    for file, table in (
        ("processor_config.json", PROCESSOR),
        ("preprocessor_config.json", PREPROCESSOR),
        ("tokenizer_config.json", TOKENIZER),
        ("tokenizer.json", TOKENIZER_JSON),
    ):
        assert check_keys(json.loads((tmp_path / "both" / file).read_text()), table, file) == []
    assert images.valid_kwargs.__annotations__.keys() - PREPROCESSOR.keys() == set()


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        (PREPROCESSOR, {"do_center_crop": True}, "do_center_crop=True"),
        (PREPROCESSOR, {"do_resize": False}, "do_resize=False"),
        (TOKENIZER, {"split_special_tokens": True}, "split_special_tokens=True"),
    ],
)
def test_what_would_change_a_result_is_refused(table, values, message):
    with pytest.raises(ConfigError, match=message):
        check_keys(values, table, "x")
