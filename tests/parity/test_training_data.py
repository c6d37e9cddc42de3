"""What is learned of a chat, and of an answer to a picture, against Transformers: the same ids, the same tokens."""

import numpy as np
import PIL.Image
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from gemkit.family import Modality, Vision
from gemkit.text.vocabulary import PLACES
from gemkit.train.data import encode_chat, encode_image
from support.chat_templates import marked
from support.photographs import FOLDER, NAMES
from support.vocabularies import tokenizer, tokenizer_json

TOWER = Modality(Vision(224, patch_size=14, width=36, depth=1, num_heads=2, mlp_width=44), placeholder=257152)


# ---------------------------------------------------------------- chats


# without characters of several tokens: their mask finds a token by its first and last character, and loses the others
CONTENT = st.lists(
    st.sampled_from(["Hello", " world", "\n", "\n\n", " ", "   ", "\t", "<td>", "user\n", "é", "日本", "3.14", "!"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@settings(max_examples=100)
@given(
    turns=st.lists(st.tuples(CONTENT, CONTENT.filter(str.strip)), min_size=1, max_size=3), system=st.none() | CONTENT
)
def test_what_is_learned_of_a_chat(name, turns, system):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    theirs, plain = marked(name)
    made = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    rendered = theirs.apply_chat_template(messages, chat_template=plain, tokenize=False)
    assert theirs.apply_chat_template(messages, tokenize=False) == rendered  # the marks change nothing
    ours = encode_chat(tokenizer(name), messages)
    assert ours.ids.tolist() == made["input_ids"]
    assert ours.weights.tolist() == made["assistant_masks"]


# ---------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def processor() -> PaliGemmaProcessor:
    vocabulary = tokenizers.Tokenizer.from_file(
        str(tokenizer_json("gemma2"))
    )  # another than `published`: it is changed
    # as in PaliGemma's own file: neither part gets a <bos>, the processor writes it
    vocabulary.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    theirs.add_tokens(PLACES)
    pictures = SiglipImageProcessorPil(size={"height": TOWER.tower.image_size, "width": TOWER.tower.image_size})
    pictures.image_seq_length = TOWER.tokens
    made = PaliGemmaProcessor(pictures, theirs)
    assert made.image_token_id == TOWER.placeholder
    return made


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(
    ("prompt", "suffix"),
    [
        ("caption en", "a cat on a sofa"),
        (
            "detect red circle ; cat",
            "<loc0100><loc0200><loc0300><loc1023> red circle ; <loc0001><loc0002><loc0003> cat",
        ),
        (
            "segment cat",
            "".join(f"<loc{i:04}>" for i in range(4)) + "".join(f"<seg{i:03}>" for i in range(16)) + " cat",
        ),
        ("detect dog", ""),
    ],
)
def test_what_is_learned_of_a_picture(processor, name, prompt, suffix):
    with PIL.Image.open(FOLDER / name) as picture:
        theirs = processor(images=picture.convert("RGB"), text=f"<image>{prompt}", suffix=suffix, return_tensors="np")
    ours = encode_image(tokenizer("paligemma"), str(FOLDER / name), prompt, suffix, vision=TOWER)
    ids, labels = theirs["input_ids"][0], theirs["labels"][0]
    assert ours.ids.tolist() == ids.tolist()
    assert np.array_equal(ours.weights > 0, labels != -100)
    assert np.array_equal(np.arange(len(ids)) < ours.prefix, theirs["token_type_ids"][0] == 0)
    assert np.array_equal(ours.images[0], theirs["pixel_values"][0])
