"""The family against its publications: sizes, patterns, names; and against the models of transformers."""

from collections import Counter
from dataclasses import FrozenInstanceError, replace
from math import prod

import pytest

from gemkit.errors import UnknownModelError
from gemkit.family import get, members, names, parameters
from gemkit.family.paligemma import ROWS_USED

# Keras preset metadata and the reports' tables, embedding counted once: (embedding, everything but the embedding)
TEXT = {
    "gemma-2b": (524_288_000, 1_981_884_416),
    "gemma-7b": (786_432_000, 7_751_248_896),
    "codegemma-2b": (524_288_000, 1_981_884_416),
    "codegemma-7b": (786_432_000, 7_751_248_896),
    "gemma-2-2b": (589_824_000, 2_024_517_888),
    "gemma-2-9b": (917_504_000, 8_324_201_984),
    "gemma-2-27b": (1_179_648_000, 26_047_480_320),
    "gemma-3-270m": (167_772_160, 100_326_016),
    "gemma-3-1b-pt": (301_989_888, 697_896_064),
    "gemma-3-4b-pt": (671_088_640, 3_209_010_688),
    "gemma-3-12b-pt": (1_006_632_960, 10_759_155_456),
    "gemma-3-27b-pt": (1_409_286_144, 25_599_716_096),
    "recurrentgemma-2b": (655_360_000, 2_027_502_080),
    "recurrentgemma-9b": (1_048_576_000, 7_531_401_216),
}

# with the 257,152 rows of big_vision and Keras; with the 257,216 rows of Hugging Face
IMAGE = {
    "paligemma-3b-pt-224": (2_923_335_408, 2_923_466_480),
    "paligemma-3b-pt-448": (2_924_220_144, 2_924_351_216),
    "paligemma-3b-pt-896": (2_927_759_088, 2_927_890_160),
    "paligemma2-3b-pt-224": (3_032_094_960, 3_032_242_416),
    "paligemma2-3b-pt-448": (3_032_979_696, 3_033_127_152),
    "paligemma2-3b-pt-896": (3_036_518_640, 3_036_666_096),
    "paligemma2-10b-pt-224": (9_662_409_456, 9_662_638_832),
    "paligemma2-10b-pt-448": (9_663_294_192, 9_663_523_568),
    "paligemma2-10b-pt-896": (9_666_833_136, 9_667_062_512),
    "paligemma2-28b-pt-224": (27_650_192_112, 27_650_487_024),
    "paligemma2-28b-pt-448": (27_651_076_848, 27_651_371_760),
    "paligemma2-28b-pt-896": (27_654_615_792, 27_654_910_704),
}

TOWER = {224: 412_442_352, 448: 413_327_088, 896: 416_866_032}


def total(decoder, vision=None, of=""):
    return sum(prod(shape) for name, shape in parameters(decoder, vision) if name.startswith(of))


@pytest.mark.parametrize("name", TEXT)
def test_text_sizes_are_the_published_ones(name):
    decoder = get(name).decoder
    embedding, rest = TEXT[name]
    assert total(decoder, of="embed_tokens") == embedding
    assert total(decoder) - embedding == rest


def test_reports_count_the_padded_rows_of_flax():
    padded = replace(get("gemma-2b").decoder, vocab_size=256_128)
    assert total(padded) == 2_506_434_560


@pytest.mark.parametrize("name", IMAGE)
def test_image_sizes_are_the_published_ones(name):
    member = get(name)
    of_keras, of_hugging_face = IMAGE[name]
    assert total(member.decoder, member.vision) == of_hugging_face
    assert total(replace(member.decoder, vocab_size=ROWS_USED), member.vision) == of_keras
    assert total(member.decoder, member.vision, of="vision_tower.") == TOWER[member.vision.tower.image_size]


def test_every_member_has_a_pinned_size():
    pinned = {get(name).decoder for name in TEXT} | {get(name).decoder for name in IMAGE}
    assert {member.decoder for member in members()} == pinned
    assert {member.vision.tower.image_size for member in members() if member.vision} == set(TOWER)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("gemma-2b", {"global": 18}),
        ("gemma-7b", {"global": 28}),
        ("gemma-2-2b", {"sliding": 13, "global": 13}),
        ("gemma-2-9b", {"sliding": 21, "global": 21}),
        ("gemma-2-27b", {"sliding": 23, "global": 23}),
        ("gemma-3-270m", {"sliding": 15, "global": 3}),
        ("gemma-3-1b", {"sliding": 22, "global": 4}),
        ("gemma-3-4b", {"sliding": 29, "global": 5}),
        ("gemma-3-12b", {"sliding": 40, "global": 8}),
        ("gemma-3-27b", {"sliding": 52, "global": 10}),
        ("recurrentgemma-2b", {"recurrent": 18, "sliding": 8}),
        ("recurrentgemma-9b", {"recurrent": 26, "sliding": 12}),
    ],
)
def test_layer_kinds(name, counts):
    layers = get(name).decoder.layers
    assert Counter(layer.mixer.kind for layer in layers) == counts
    assert len(layers) == sum(counts.values())


def test_where_the_kinds_sit():
    def of_kind(name, kind):
        return [i for i, layer in enumerate(get(name).decoder.layers) if layer.mixer.kind == kind]

    assert of_kind("gemma-2-2b", "sliding") == list(range(0, 26, 2))
    assert of_kind("gemma-3-4b", "global") == [5, 11, 17, 23, 29]
    assert of_kind("recurrentgemma-2b", "sliding") == list(range(2, 26, 3))


def test_numbers_that_are_easy_to_get_wrong():
    def attention(name):
        return get(name).decoder.attention

    def scale(name):
        (only,) = {mixer.scale for mixer in attention(name)}
        return only

    assert scale("gemma-2-9b") == 1 / 16
    assert scale("gemma-2-27b") == pytest.approx(1 / 12)  # sqrt(4608 / 32) = 12
    assert scale("gemma-3-27b") == pytest.approx(168**-0.5)
    assert [mixer.rope.factor for mixer in attention("gemma-3-4b")[4:6]] == [1.0, 8.0]
    assert [mixer.rope.base for mixer in attention("gemma-3-1b")[4:6]] == [10_000.0, 1_000_000.0]
    assert attention("gemma-3-1b")[5].rope.factor == 1.0
    assert get("recurrentgemma-2b").decoder.layers[2].mixer.window == 2049
    assert get("gemma-3-27b").decoder.final_softcap is None
    assert get("paligemma2-3b-pt-224").decoder.final_softcap == 30.0


# ---------------------------------------------------------------- against transformers


def transformers_config(name):
    """The configuration that the released repository of that name carries, as far as it shapes parameters."""
    import transformers as hf

    if name.startswith("paligemma"):
        text = {"paligemma-3b-pt-896": "gemma-2b", "paligemma2-10b-pt-224": "gemma-2-9b"}[name]
        text_config = transformers_config(text)
        text_config.vocab_size = 257_216
        pixels = int(name.rsplit("-", 1)[1])
        vision = {"image_size": pixels, "patch_size": 14, "hidden_size": 1152, "intermediate_size": 4304}
        vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "vision_use_head": False}
        return hf.PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", **vision},
            text_config=text_config.to_dict(),
            projection_dim=text_config.hidden_size,
        )
    kind, d, layers, ff, h, kv, hd, v = {
        "gemma-2b": (hf.GemmaConfig, 2048, 18, 16384, 8, 1, 256, 256000),
        "gemma-7b": (hf.GemmaConfig, 3072, 28, 24576, 16, 16, 256, 256000),
        "gemma-2-9b": (hf.Gemma2Config, 3584, 42, 14336, 16, 8, 256, 256000),
        "gemma-2-27b": (hf.Gemma2Config, 4608, 46, 36864, 32, 16, 128, 256000),
        "gemma-3-1b-pt": (hf.Gemma3TextConfig, 1152, 26, 6912, 4, 1, 256, 262144),
        "gemma-3-27b-pt": (hf.Gemma3TextConfig, 5376, 62, 21504, 32, 16, 128, 262144),
        "recurrentgemma-2b": (hf.RecurrentGemmaConfig, 2560, 26, 2 * 7680, 10, 1, 256, 256000),
    }[name]
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "intermediate_size": ff, "head_dim": hd, "vocab_size": v}
    return kind(**sizes, num_attention_heads=h, num_key_value_heads=kv)


@pytest.mark.parametrize(
    "name",
    [
        "gemma-2b",
        "gemma-7b",
        "gemma-2-27b",
        "gemma-3-1b-pt",
        "gemma-3-27b-pt",
        "recurrentgemma-2b",
        "paligemma-3b-pt-896",
        "paligemma2-10b-pt-224",
    ],
)
def test_the_same_shapes_as_transformers(name):
    import torch
    import transformers as hf

    member = get(name)
    auto = hf.AutoModelForImageTextToText if member.vision else hf.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(transformers_config(name))
    theirs = {id(p): tuple(p.shape) for p in model.parameters()}.values()  # by identity: a tied table counts once
    ours = [shape for _, shape in parameters(member.decoder, member.vision)]
    without_ones = sorted(tuple(n for n in shape if n > 1) for shape in theirs)  # their convolution is (w, 1, 4)
    assert sorted(ours) == without_ones


@pytest.mark.parametrize("name", ["gemma-2-9b", "gemma-2-27b", "gemma-3-1b-pt", "gemma-3-27b-pt"])
def test_the_same_layers_slide_as_in_transformers(name):
    types = transformers_config(name).layer_types
    assert [t == "sliding_attention" for t in types] == [m.kind == "sliding" for m in get(name).decoder.attention]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("google/gemma-2b", "gemma-2b"),
        ("Google/Gemma-1.1-2B-it", "gemma-1.1-2b-it"),
        ("gemma_instruct_7b_en", "gemma-7b-it"),
        ("gemma_1.1_instruct_2b_en", "gemma-1.1-2b-it"),
        ("code_gemma_2b_en", "codegemma-2b"),
        ("code_gemma_1.1_instruct_7b_en", "codegemma-1.1-7b-it"),
        ("google/codegemma-1.1-2b", "codegemma-1.1-2b"),
        ("gemma2_instruct_2b_en", "gemma-2-2b-it"),
        ("google/recurrentgemma-2b-it", "recurrentgemma-2b-it"),
        ("pali_gemma_3b_mix_224", "paligemma-3b-mix-224"),
        ("pali_gemma_3b_896", "paligemma-3b-pt-896"),
        ("pali_gemma2_pt_3b_224", "paligemma2-3b-pt-224"),
        ("pali_gemma2_mix_28b_448", "paligemma2-28b-mix-448"),
        ("gemma3_270m", "gemma-3-270m"),
        ("gemma3_instruct_1b", "gemma-3-1b-it"),
        ("gemma3_instruct_4b_text", "gemma-3-4b-it"),
        ("gemma-3-1b", "gemma-3-1b-pt"),
        ("GEMMA_3_12B_IT", "gemma-3-12b-it"),
    ],
)
def test_every_way_to_say_a_name(alias, name):
    assert get(alias).name == name


def test_names_are_unique_and_are_the_hub_ids():
    assert len(set(names())) == len(names()) == 51
    assert all(member.hub_id == "google/" + member.name for member in members())
    said = [alias for member in members() for alias in (member.name, member.hub_id, *member.aliases)]
    assert len({alias.lower().replace("_", "-") for alias in said}) == len(said)


def test_what_a_release_answers_follows_its_name():
    for member in members():
        if member.name.endswith("-it"):
            assert (member.tuning, member.prompts) == ("instruction-tuned", ("chat",))
        if member.family == "CodeGemma" and member.tuning == "pretrained":
            assert "infill" in member.prompts
        assert (member.vision is not None) == ("image" in member.prompts) == (member.vocabulary == "paligemma")


def test_an_unknown_name_says_the_nearest():
    with pytest.raises(UnknownModelError, match="gemma-2-2b-it"):
        get("gemma-2-2b-itt")


def test_members_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        get("gemma-2b").decoder.width = 1
