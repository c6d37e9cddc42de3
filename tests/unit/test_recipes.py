"""The recipes' own parts: vocabularies, data, experiments, and what the model that one of them left can do."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import gemkit
from gemkit.cli import main
from gemkit.text import Tokenizer, places
from gemkit.text.vocabulary import INFILL
from gemkit.train import experiment
from gemkit.train.new_model import new_model
from support.recipe_scripts import RECIPES, load

CODE = Path(__file__).parents[1] / "data" / "code"  # the model that recipe b left, and the lines it was measured with


@pytest.mark.parametrize("name", ["code", "shapes", "letters"])
def test_small_vocabularies_begin_as_the_familys_do(name):
    small = Tokenizer.from_model(RECIPES / "tokenizers" / f"{name}.model")
    ids = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107, "\n": 108}
    assert {piece: small.id(piece) for piece in ids} == ids
    assert (small.id("▁▁"), small.id("▁" * 31)) == (139, 168)
    assert all(small.piece(i) in (piece, f"<unused{i - 7}>") for i, piece in INFILL.items())
    for text in ("import os\n\n\tif x:  # ünïcode", "sort dbca", "detect red circle", "\0 12345"):
        assert small.decode(small.encode(text)) == text


def test_the_vocabulary_of_letters_has_one_token_for_each():
    letters = Tokenizer.from_model(RECIPES / "tokenizers" / "letters.model")
    assert [letters.piece(i) for i in letters.encode("sort dbca")] == [*"sort", "▁", *"dbca"]


def test_the_vocabulary_of_code_fills_in():
    code = Tokenizer.from_model(RECIPES / "tokenizers" / "code.model")
    assert {i: code.piece(i) for i in INFILL} == INFILL


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.toml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_experiments_are_read(path):
    read = experiment.read(path)
    assert read.objective in experiment.OBJECTIVES
    assert read.data.train.startswith("data/")
    if read.model.new:
        decoder, _ = new_model(read.model.new, 512)
        assert decoder.max_context >= read.data.max_length


def test_no_variant_of_the_caret_example_is_trained_on():
    """No file that `make_data` makes holds one to the letter; only a module with all of its lines could make one."""
    make_data = load("b-codegemma/make_data.py")
    variants = {make_data.PREFIX + name + suffix for name, suffix in make_data.VARIANTS.items()}
    assert len(variants) == 30
    assert "sys" in make_data.VARIANTS
    lines = [[line.strip() for line in suffix.splitlines() if line.strip()] for suffix in make_data.VARIANTS.values()]
    for path in make_data.library_files():
        source = path.read_text(encoding="utf-8")
        if any(all(line in source for line in wanted) for wanted in lines):
            made = make_data.small_files(source, np.random.default_rng(0))
            assert not any(variant in text for text in made for variant in variants), path


def test_small_files_import_what_they_use():
    make_data = load("b-codegemma/make_data.py")
    source = (
        "import os\nimport sys, re as r\n\ndef f():\n    return r.match('a', os.sep)\n\ndef g():\n    sys.exit(0)\n"
    )
    made = list(make_data.small_files(source, np.random.default_rng(0)))
    used = {"import os", "import re as r"}
    assert any(used <= set(text.splitlines()) and "sys" not in text and "def f" in text for text in made)
    assert all(t.startswith(("import ", "def ")) for t in made)


def test_lines_to_measure_with_are_whole_and_come_from_their_files():
    make_data = load("b-codegemma/make_data.py")
    records = [{"text": "import os\n\n\ndef f():\n    return os\n"}, {"text": "x\n"}]
    made = {
        tuple(cut.values())
        for seed in range(50)
        for cut in make_data.single_lines(records, np.random.default_rng(seed))
    }
    assert made == {
        ("", "import os", "\n\n\ndef f():\n    return os\n"),
        ("import os\n\n\n", "def f():", "\n    return os\n"),
        ("import os\n\n\ndef f():\n    ", "return os", "\n"),
    }


def test_no_import_comes_too_often():
    make_data = load("b-codegemma/make_data.py")
    often = [{"text": f"import os\nprint({i})\n"} for i in range(make_data.OFTEN + 100)]
    others = [{"text": "import os\nimport glob\n"}, {"text": "x = 1\n"}]
    kept = make_data.balanced([*often, *others], np.random.default_rng(0))
    assert all(record in kept for record in others)
    assert len(kept) - 2 in (make_data.OFTEN - 1, make_data.OFTEN)


@pytest.fixture(scope="module")
def code_model():
    return gemkit.load(CODE)


def test_the_tiny_codegemma_imports_what_is_used(code_model):
    """The goal is 24 of 30, `sys` among them; measured: 29."""
    answers = load("b-codegemma/evaluate.py").caret_answers(code_model)
    assert answers["sys"] == "sys"
    assert sum(answer == module for module, answer in answers.items()) >= 24, answers


def test_the_tiny_codegemma_fills_in_held_out_lines(code_model):
    """Measured: 40 of 200 to the letter; another order of sums may move a few."""
    evaluate = load("b-codegemma/evaluate.py")
    lines = list(evaluate.read_jsonl(CODE / "lines.jsonl"))
    assert len(lines) == 200
    assert sum(evaluate.exact_lines(code_model, lines)) >= 36


def test_the_tiny_codegemma_on_the_command_line(capsys):
    suffix = load("b-codegemma/variants.py").VARIANTS["sys"]
    assert main(["infill", "-m", str(CODE), "--prefix", "import ", "--suffix", suffix]) == 0
    assert capsys.readouterr().out.strip() == "sys"
    assert sum(path.stat().st_size for path in CODE.iterdir()) < 10_000_000


def test_pictures_show_what_is_said_of_them():
    """The box of every shape is that of its pixels, to within the one pixel that an edge blurs over."""
    make_data = load("f-paligemma/make_data.py")
    rng = np.random.default_rng(0)
    centres = np.arange(make_data.SIDE) + 0.5
    for _ in range(20):
        shapes = make_data.scene(rng)
        assert 2 <= len(shapes) <= 4
        assert len({shape.thing for shape in shapes}) == len(shapes)
        for shape in shapes:
            ys, xs = np.nonzero(shape.covers(centres, centres[:, None]) > 0.5)
            drawn = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert np.allclose(drawn, shape.place.box.pixels(make_data.SIDE, make_data.SIDE), atol=1.5)


def test_held_out_pictures_are_as_many_as_are_told():
    make_data = load("f-paligemma/make_data.py")
    held_out = [asked for _, [asked] in make_data.held_out(seed=1)]
    absent = [prompt for prompt, said in held_out if not said]
    assert (len(held_out), len(absent)) == (200, 50)
    for prompt, said in held_out:
        assert [f"detect {place.label}" for place in places.parse(said).places] == ([prompt] if said else [])
    again = itertools.islice(make_data.examples(seed=3), 3)
    for (a, b), (c, d) in zip(itertools.islice(make_data.examples(seed=3), 3), again, strict=True):
        assert np.array_equal(a, c)
        assert b == d


def test_several_things_are_answered_in_the_order_in_which_they_are_asked_for():
    make_data = load("f-paligemma/make_data.py")
    asked = [each for _, questions in itertools.islice(make_data.examples(seed=3), 200) for each in questions]
    detected = [(prompt, said) for prompt, said in asked if prompt.startswith("detect ")]
    for prompt, said in detected:
        things = prompt.removeprefix("detect ").split(" ; ")
        found = [place.label for place in places.parse(said).places]
        assert found == things or (len(things) == 1 and not said)
    assert any(prompt.count(";") == 3 for prompt, _ in detected)
    assert 0.2 < sum(not said for _, said in detected) / len(detected) < 0.4
    assert {prompt for prompt, _ in asked if not prompt.startswith("detect ")} == {"caption en"}


def test_letters_are_sorted_and_mistakes_are_mistakes():
    make_data = load("d-rl/make_data.py")
    rng = np.random.default_rng(0)
    for word in itertools.islice(make_data.words(seed=0), 300):
        record = make_data.records("preferences", word, rng)
        assert record["chosen"] == "".join(sorted(word)) != record["rejected"]
