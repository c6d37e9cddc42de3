"""Infilling: formats to the id, rates, rows of several files, and the order of a repository."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import ConfigError, ContextError, ModelError
from gemkit.text import infill
from gemkit.train.data import Infilling, encode_infill, repo_order
from support.vocabularies import library_sources, tokenizer

PREFIX, MIDDLE, SUFFIX, SEPARATOR = 67, 68, 69, 70
CODE = "import sys\n\n\ndef main():\n    sys.exit(0)\n"
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t<>|_"), max_size=40)
ALWAYS = {"rate": 1.0}


def rng(seed=0):
    return np.random.default_rng(seed)


def one(text, seed=0, path=None, **how):
    (row,) = encode_infill(tokenizer("codegemma"), [(path, text)], rng(seed), how=Infilling(**how))
    return row


def taken_apart(ids):
    """The texts of a row of one file: order of the marks, path line, before, middle, after."""
    ours = tokenizer("codegemma")
    assert ids[0] == ours.bos
    parts, names = [[]], ["path"]
    for i in ids[1:-1].tolist():
        if i in (PREFIX, MIDDLE, SUFFIX):
            parts.append([])
            names.append({PREFIX: "before", MIDDLE: "middle", SUFFIX: "after"}[i])
        else:
            parts[-1].append(i)
    return names, dict(zip(names, map(ours.decode, parts), strict=True))


# ---------------------------------------------------------------- formats


@given(text=TEXT, path=st.sampled_from([None, "src/main.py"]), seed=st.integers(0, 99))
def test_psm_is_the_prompt_of_inference_and_its_answer(text, path, seed):
    """To the id: `prompts.infill` of what stands around, then the middle, then <|file_separator|>."""
    ours = tokenizer("codegemma")
    row = one(text, seed, path, rate=1.0, spm=0.0)
    names, parts = taken_apart(row.ids)
    assert names == ["path", "before", "after", "middle"]
    before, middle, after = (parts[name].replace(" ", " ") for name in ("before", "middle", "after"))
    assert (before + middle + after).replace("▁", " ") == text.replace("▁", " ")
    if "▁" in text:
        return  # which the vocabulary cannot tell from a space
    prompt = infill(ours, before, after, path=path)
    assert row.ids.tolist() == [*prompt.ids, *ours.encode(middle), SEPARATOR]
    assert row.ids[-1] in prompt.stop_ids
    assert row.weights.tolist() == [0, *[1] * (len(row) - 1)]


@given(text=TEXT, seed=st.integers(0, 99))
def test_spm_has_the_suffix_first(text, seed):
    row = one(text, seed, "a.py", rate=1.0, spm=1.0, learn="middle")
    names, parts = taken_apart(row.ids)
    assert names == ["path", "after", "before", "middle"]
    assert parts["path"] == "a.py\n"
    assert parts["before"] + parts["middle"] + parts["after"] == text.replace("▁", " ")
    start = row.ids.tolist().index(MIDDLE) + 1
    assert row.weights.tolist() == [0] * start + [1] * (len(row) - start)


def test_a_middle_may_count_more():
    row = one(CODE, path="a.py", weight=4.0, **ALWAYS)
    start = row.ids.tolist().index(MIDDLE) + 1
    assert row.weights.tolist() == [0, *[1] * (start - 1), *[4] * (len(row) - start)]
    assert set(one(CODE, rate=0.0, weight=4.0).weights[1:]) == {1}
    assert set(one(CODE, weight=4.0, learn="middle", **ALWAYS).weights) == {0, 4}


def test_a_file_that_is_left_whole():
    ours = tokenizer("codegemma")
    row = one(CODE, path="a.py", rate=0.0)
    assert row.ids.tolist() == [ours.bos, *ours.encode(f"a.py\n{CODE}"), SEPARATOR]
    assert one(CODE, rate=0.0, end="eos").ids[-1] == ours.eos
    assert one(CODE, rate=0.0, learn="middle").weights.sum() == len(one(CODE, rate=0.0)) - 1


def test_several_files_are_the_prompt_of_inference_too():
    """A row of a whole file and one that is cut: what `prompts.infill` makes of the same."""
    ours = tokenizer("codegemma")
    files = [("base.py", "x = 1\n"), ("use.py", CODE)]
    for seed in range(100):
        (row,) = encode_infill(ours, files, rng(seed), how=Infilling(rate=0.5, spm=0.0))
        ids = row.ids.tolist()
        if ids.count(MIDDLE) == 1 and ids.index(SEPARATOR) < ids.index(MIDDLE):
            break
    _, parts = taken_apart(np.array([ours.bos, *ids[ids.index(SEPARATOR) + 1 :]]))
    prompt = infill(ours, parts["before"], parts["after"], path="use.py", files=files[:1])
    assert ids == [*prompt.ids, *ours.encode(parts["middle"]), SEPARATOR]


# ---------------------------------------------------------------- chance


def test_rates_are_as_asked():
    """3,000 draws: two standard deviations of a share are below 2 %."""
    rows = [one(CODE, seed) for seed in range(3000)]
    cut = [row for row in rows if MIDDLE in row.ids]
    suffix_first = [row for row in cut if row.ids[1] == SUFFIX]
    assert len(cut) / len(rows) == pytest.approx(0.8, abs=0.02)
    assert len(suffix_first) / len(cut) == pytest.approx(0.5, abs=0.02)
    starts = [len(taken_apart(row.ids)[1]["before"]) for row in cut]
    ends = [len(CODE) - len(taken_apart(row.ids)[1]["after"]) for row in cut]
    # the lesser and the greater of two uniform draws
    assert np.mean(starts) / len(CODE) == pytest.approx(1 / 3, abs=0.02)
    assert np.mean(ends) / len(CODE) == pytest.approx(2 / 3, abs=0.02)


def test_the_same_chance_makes_the_same_rows():
    assert one(CODE, 5).ids.tolist() == one(CODE, 5).ids.tolist()
    assert len({tuple(one(CODE, seed).ids) for seed in range(20)}) > 10  # one in five is left whole


def test_a_middle_within_a_line():
    for seed in range(200):
        row = one(CODE, seed, within_line=1.0, **ALWAYS)
        assert "\n" not in taken_apart(row.ids)[1]["middle"]
    middles = {taken_apart(one(CODE, seed, within_line=1.0, **ALWAYS).ids)[1]["middle"] for seed in range(2000)}
    assert {"", "sys", "sys.exit(0)"} <= middles


def test_a_middle_of_whole_words():
    rows = [one(CODE, seed, within_line=1.0, words=1.0, **ALWAYS) for seed in range(500)]
    parts = [taken_apart(row.ids)[1] for row in rows]
    middles = [part["middle"] for part in parts]
    assert all("\n" not in middle for middle in middles)
    for part in parts:
        borders = (part["before"], part["middle"]), (part["middle"], part["after"])
        assert not any(before[-1:].isidentifier() and after[:1].isidentifier() for before, after in borders), part
    assert {"sys", "sys.exit"} <= set(middles)
    assert "" not in middles


def test_a_middle_that_is_a_line_but_for_its_indentation():
    middles = {taken_apart(one(CODE, seed, lines=1.0, **ALWAYS).ids)[1]["middle"] for seed in range(100)}
    assert middles == {"import sys", "def main():", "sys.exit(0)"}
    assert taken_apart(one("\n \n", lines=1.0, **ALWAYS).ids)[0] == ["path", "before", "after", "middle"]


def test_a_middle_that_is_a_name_from_around_it():
    text = "import sys, os\nsys.path = sys.argv[1:] + systems\nfile = os.open(1, 2, 1)\n"
    cuts = [taken_apart(one(text, seed, names=1.0, **ALWAYS).ids)[1] for seed in range(400)]
    places = Counter((cut["middle"], len(cut["before"])) for cut in cuts)
    # of the names that come again: each as often as another, its first place as often as all others together
    assert set(places) == {("sys", 7), ("sys", 15), ("sys", 26), ("os", 12), ("os", 56)}
    shares = {"sys": 1 / 2, "os": 1 / 2, 7: 1 / 4, 12: 1 / 4}
    for what, share in shares.items():
        assert sum(n for key, n in places.items() if what in key) / 400 == pytest.approx(share, abs=0.06), what
    assert taken_apart(one("x = 1 + 1\n", names=1.0, **ALWAYS).ids)[0] == ["path", "before", "after", "middle"]


# ---------------------------------------------------------------- contexts


@pytest.mark.parametrize("context", [64, 200, 512])
def test_long_files_are_cut_and_nothing_is_lost(context):
    ours = tokenizer("codegemma")
    text = library_sources()[10].read_text()[:20_000]
    rows = encode_infill(ours, [("a/b.py", text)], rng(), context=context)
    assert all(len(row) <= context and row.ids[0] == ours.bos for row in rows)
    found = ""
    for row in rows:
        start = 1
        ids = row.ids.tolist()
        for end in (i for i, id in enumerate(ids) if id == SEPARATOR):
            _, parts = taken_apart(np.array([ours.bos, *ids[start : end + 1]]))
            assert parts["path"].startswith("a/b.py\n")
            found += parts["path"].removeprefix("a/b.py\n")
            found += "".join(parts.get(name, "") for name in ("before", "middle", "after"))
            start = end + 1
    assert found == text
    assert np.mean([len(row) for row in rows]) > 0.5 * context
    assert sum(MIDDLE in row.ids for row in rows) > 0.6 * len(rows)


def test_small_files_share_a_row():
    rows = encode_infill(tokenizer("codegemma"), [(f"{i}.py", CODE) for i in range(20)], rng(), context=128)
    assert 3 <= len(rows) <= 6
    assert sum(int((row.ids == SEPARATOR).sum()) for row in rows) == 20


def test_a_character_of_many_bytes_and_a_long_path():
    ours = tokenizer("codegemma")
    rows = encode_infill(ours, [("p" * 500, "\U0001fae8" * 100)], rng(), context=32)
    assert all(len(row) <= 32 for row in rows)
    with pytest.raises(ContextError, match="context=10 has no room to cut code in three"):
        encode_infill(ours, [(None, CODE)], rng(), context=10)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"lines": 0.6, "names": 0.5}, "together 1 at most"),
        ({"weight": 0.0}, "weight=0.0 must be above 0"),
        ({"rate": 1.5}, "rate=1.5 must be a share"),
        ({"learn": "some"}, "learn='some'"),
        ({"end": "bos"}, "end='bos'"),
    ],
)
def test_what_is_no_way_to_cut(how, message):
    with pytest.raises(ConfigError, match=message):
        Infilling(**how)


def test_a_vocabulary_without_the_marks():
    with pytest.raises(ModelError, match="the format is that of CodeGemma"):
        encode_infill(tokenizer("gemma3"), [(None, CODE)], rng())


# ---------------------------------------------------------------- the order of a repository


def test_files_come_after_what_they_import():
    files = {
        "app/main.py": "import os\nfrom app import views, models\n",
        "app/views.py": "from .models import Model\nfrom app.helpers.text import shorten\n",
        "app/models.py": "from . import base\n",
        "app/base.py": "import sys\n",
        "app/helpers/text.py": "",
        "notes.md": "",
        "lone.py": "x = 1\n",
        "test_lone.py": "assert True\n",
        "middle.py": "y = 2\n",
    }
    assert repo_order.order(files) == [
        "app/base.py", "app/models.py", "app/helpers/text.py", "app/views.py", "app/main.py",
        "lone.py", "test_lone.py", "middle.py", "notes.md",
    ]  # fmt: skip
    assert repo_order.order(dict(reversed(files.items()))) == repo_order.order(files)


def test_a_circle_begins_where_least_is_missing():
    files = {"a.py": "import b\nimport c\n", "b.py": "import a\nfrom a import x\nimport c\n", "c.py": "import a\n"}
    assert repo_order.dependencies(files)["b.py"] == {"a.py": 2, "c.py": 1}
    assert repo_order.order(files) == ["c.py", "a.py", "b.py"]


@pytest.mark.parametrize(
    ("path", "text", "target"),
    [
        ("src/a.c", '#include "a.h"\n', "src/a.h"),
        ("src/a.c", "#include <lib/b.h>\n", "lib/b.h"),
        ("web/a.ts", "import { x } from './util/b'\n", "web/util/b.ts"),
        ("web/util/c.js", "const b = require('../a');\n", "web/a.ts"),
        ("org/x/TestFoo.java", "import org.x.Foo;\n", "org/x/Foo.java"),
        ("pkg/sub/c.py", "from ..top import y\n", "pkg/top.py"),
        ("pkg/sub/c.py", "import pkg\n", "pkg/__init__.py"),
        ("pkg/sub/c.py", "import top as t, os\n", "pkg/top.py"),
    ],
)
def test_imports_of_several_languages(path, text, target):
    others = (
        "src/a.h", "lib/b.h", "web/util/b.ts", "web/a.ts", "org/x/Foo.java", "pkg/top.py", "pkg/__init__.py"
    )  # fmt: skip
    files = dict.fromkeys(others, "") | {path: text}
    assert list(repo_order.dependencies(files)[path]) == [target]


def test_a_test_comes_after_what_it_tests():
    files = {
        "a.py": "",
        "b.py": "import a\n",
        "test_a.py": "import a\n",
        "c_test.go": "",
        "c.go": "",
        "FooTest.java": "",
        "Foo.java": "",
    }
    order = repo_order.order(files)
    assert order[:2] == ["a.py", "test_a.py"]
    assert order[3:] == ["Foo.java", "FooTest.java", "c.go", "c_test.go"]


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.sampled_from("abcdefgh"), max_size=4), min_size=1))
def test_every_file_comes_once(imports):
    files = {f"{name}.py": "".join(f"import {other}\n" for other in others) for name, others in imports.items()}
    order = repo_order.order(files)
    assert sorted(order) == sorted(files)
    needs = repo_order.dependencies(files)
    if not _circular(needs):
        assert all(order.index(other) < order.index(path) for path in files for other in needs[path])


def _circular(needs):
    left = {path: set(of) for path, of in needs.items()}
    while free := [path for path, of in left.items() if not of]:
        for path in free:
            del left[path]
        for of in left.values():
            of.difference_update(free)
    return bool(left)


def test_groups():
    assert list(repo_order.groups([3, 3, 3, 20, 1], 7)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(repo_order.groups([], 7)) == []
