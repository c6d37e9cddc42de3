"""The tiny PaliGemma of recipe f, in `data/shapes`: what it sees in pictures that are made anew, in Python and in the
shell. It was trained by `gemkit tune` from random weights; its card says how."""

from pathlib import Path

import pytest

import gemkit
from support.recipe_scripts import load

MODEL = Path(__file__).parents[1] / "data" / "shapes"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A folder of the 200 pictures that the recipe measures with."""
    make_data = load("f-paligemma/make_data.py")
    folder = tmp_path_factory.mktemp("shapes")
    assert make_data.write(folder, "held-out", make_data.held_out(make_data.HELD_OUT_SEED)) == 200
    return folder


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_it_finds_what_is_there_and_nothing_else(held_out, executor):
    evaluate = load("f-paligemma/evaluate.py")
    found = evaluate.measure(gemkit.load(MODEL, executor=executor), held_out)
    assert (found["present"], found["absent"]) == (150, 50)
    assert found["overlap"] >= 0.79  # 0.813 was measured
    assert found["empty"] >= 0.96  # 1.0 was measured


def test_the_shell_finds_it_too(held_out, run):
    """The first picture, and the last, in which what is asked for is not."""
    evaluate = load("f-paligemma/evaluate.py")
    first, *_, last = evaluate.read_jsonl(held_out / "held-out.jsonl")
    for record, lines in ((first, 1), (last, 0)):
        thing = record["prompt"].removeprefix("detect ")
        code, out, _ = run("detect", "-m", MODEL, held_out / record["image"], thing)
        assert code == 0
        assert len(out.splitlines()) == lines
        assert out.startswith(f"{thing} at ") or not lines
