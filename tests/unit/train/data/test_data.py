"""From a file to units, through the objectives whose encodings are defined with the data."""

import json

import numpy as np
import PIL.Image
import pytest

from gemkit.family import Modality, Vision
from gemkit.train.data import Infilling, Steps, encode_image, encode_infill, open_data
from gemkit.train.objectives.image import Image
from gemkit.train.objectives.infill import Infill
from support.vocabularies import tokenizer

TOWER = Modality(Vision(28, patch_size=14, width=36, depth=1, num_heads=2, mlp_width=44), placeholder=257152)


def ids(units):
    return [[example.ids.tolist() for example in unit] for unit in units]


@pytest.mark.parametrize("form", ["text", "files"])
def test_code_is_cut_for_infilling(tmp_path, form):
    for name, text in (("a.py", "x = 1\n" * 50), ("b.py", "import a\n\nprint(a.x)\n")):
        (tmp_path / name).write_text(text)
    ours, how = tokenizer("codegemma"), Infilling(rate=0.9)
    data = open_data(tmp_path, form)
    objective = Infill(ours, how, context=128)
    made = [unit for record in data for unit in objective.encode(record, np.random.default_rng(3))]
    files = [("a.py", "x = 1\n" * 50), ("b.py", "import a\n\nprint(a.x)\n")]
    expected = []
    for some in [files] if form == "files" else [[file] for file in files]:
        expected += encode_infill(ours, some, np.random.default_rng(3), how=how, context=128)
    assert ids(made) == [[row.ids.tolist()] for row in expected]
    steps = list(Steps(data, objective, seed=0, batch_tokens=256, max_length=128, epochs=1))
    assert sum(len(step) for step in steps) >= 3
    # it is a mean over tokens: all of them but <bos>
    assert objective.size(steps[0]) == sum(len(row) - 1 for (row,) in steps[0])


def test_an_epoch_later_the_same_file_is_cut_elsewhere(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n" * 9)
    steps = Steps(open_data(tmp_path), Infill(tokenizer("codegemma"), context=256), seed=0, batch_size=1)
    assert len({tuple(next(steps)[0][0].ids.tolist()) for _ in range(8)}) > 5


def test_pictures_beside_their_data_file(tmp_path):
    PIL.Image.fromarray(np.full((9, 5, 3), 200, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"image": "a.png", "prompt": "detect cat", "suffix": s}) + "\n" for s in ("", "a b c d"))
    )
    ours = tokenizer("paligemma")
    objective = Image(ours, vision=TOWER)
    (step,) = Steps(open_data(tmp_path), objective, seed=0, batch_size=2, shuffle=False, epochs=1)
    for (example,), suffix in zip(step, ("", "a b c d"), strict=True):
        expected = encode_image(ours, str(tmp_path / "a.png"), "detect cat", suffix, vision=TOWER)
        assert example.ids.tolist() == expected.ids.tolist()
        assert np.array_equal(example.images[0], expected.images[0])
    # long and short answers count the same
    assert objective.size(step) == pytest.approx(2)
