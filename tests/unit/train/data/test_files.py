"""Files to records: every form, every source, and each thing that may be wrong with them, with its place."""

import contextlib
import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import AccessError, ConfigError, DataError, MissingExtraError
from gemkit.train.data import Data, files, open_data, sources

USER = {"role": "user", "content": "Hi"}
MODEL = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}
CHAT = {"messages": [USER, MODEL]}
GOOD = json.dumps(CHAT)


def lines(folder, *texts, name="data.jsonl"):
    """A file of these lines."""
    path = folder / name
    path.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts))
    return path


def wrong(folder, *texts, form=None):
    """What is said of a file of these lines, without its path."""
    path = lines(folder, *texts)
    with pytest.raises(DataError) as error:
        open_data(path, form)
    return str(error.value).replace(str(path), "data.jsonl")


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("text", {"text": "Once"}, {"text": "Once"}),
        ("text", {"text": "x = 1", "path": "a.py"}, {"text": "x = 1", "path": "a.py"}),
        ("files", {"files": [{"path": "a.py", "text": "x"}]}, {"files": [{"path": "a.py", "text": "x"}]}),
        ("completion", {"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"}),
        (
            "completion",
            {"prompt": [SYSTEM, USER], "completion": [MODEL]},
            {"prompt": [SYSTEM, USER], "completion": "Hello"},
        ),
        ("chat", CHAT, CHAT),
        (
            "chat",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            CHAT | {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        ),
        (
            "chat",
            {"messages": [SYSTEM, USER, {"role": "model", "content": "Hello"}]},
            {"messages": [SYSTEM, USER, MODEL]},
        ),
        (
            "preference",
            {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
            {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        ),
        (
            "preference",
            {"prompt": "Hi", "chosen": [USER, MODEL], "rejected": [USER, {"role": "assistant", "content": "No"}]},
            {"prompt": [USER], "chosen": "Hello", "rejected": "No"},
        ),
        (
            "preference",
            {"chosen": [SYSTEM, USER, MODEL], "rejected": [SYSTEM, USER, {"role": "assistant", "content": "No"}]},
            {"prompt": [SYSTEM, USER], "chosen": "Hello", "rejected": "No"},
        ),
        ("prompt", {"prompt": "17+25=", "answer": 42}, {"prompt": "17+25=", "answer": 42}),
        ("prompt", {"prompt": [USER], "answer": 42}, {"prompt": [USER], "answer": 42}),
    ],
)
def test_a_form_is_detected_and_has_one_spelling(tmp_path, form, record, expected):
    data = open_data(lines(tmp_path, json.dumps(record)))
    assert (data.form, len(data), data[0]) == (form, 1, expected)
    assert Data.of([record])[0] == expected  # in memory too


def test_images_are_beside_their_data_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    path = lines(
        tmp_path,
        json.dumps({"image": "pictures/a.png", "prefix": "detect cat", "suffix": ""}),
        json.dumps({"image": ["pictures/a.png"] * 2, "prompt": "cap en", "suffix": "two"}),
    )
    data = open_data(path)
    file = str(tmp_path / "pictures" / "a.png")
    assert data.form == "image"
    assert (data[0]["image"], data[0]["prompt"], data[0]["suffix"]) == ([file], "detect cat", "")
    assert data[1]["image"] == [file, file]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "the fields (none) make no form of training data"),
        (
            {"txt": "a"},
            "the fields 'txt' make no form of training data (preference: chosen, rejected; chat:",
        ),
        ({"text": ""}, "text is empty"),
        ({"text": " \n"}, "text is only white space"),
        ({"text": 3}, "text is a number 3, not a text"),
        ({"text": None}, "text is missing or null, not a text"),
        ({"text": "a\ud800"}, "text has the lone surrogate U+D800"),
        ({"messages": []}, "messages is empty; a conversation begins"),
        ({"messages": "Hi"}, "messages is the text 'Hi', not a list of messages"),
        ({"messages": ["Hi"]}, "messages[0] is the text 'Hi', not an object with role and content"),
        ({"messages": [SYSTEM]}, "messages has a system message and no other"),
        ({"messages": [USER]}, "messages has no answer by the assistant to the user, so there is nothing to learn"),
        ({"messages": [MODEL, USER]}, "messages has no answer by the assistant to the user"),
        ({"messages": [MODEL]}, "messages[0] is by the assistant, expected the user: after an optional"),
        ({"messages": [USER, USER, MODEL]}, "messages[1] is by the user, expected the assistant"),
        ({"messages": [USER, MODEL, SYSTEM]}, "messages[2] is by the system, expected the user"),
        (
            {"messages": [USER, {"role": "critic", "content": "x"}]},
            "messages[1].role is the text 'critic'; roles are",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "no messages[1].content among the fields 'role'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": ["a"]}]},
            "messages[1].content[0] is the text 'a', not an object with type and text",
        ),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from is the text 'bot'"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": [USER, MODEL], "completion": "a"}, "prompt[1] is by the assistant; it must end with the user"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same, so neither is preferred"),
        ({"chosen": "b", "rejected": "c"}, "prompt is missing or null, not a text"),
        ({"chosen": [USER], "rejected": [USER]}, "chosen must end with a message by the assistant, not by the user"),
        (
            {"chosen": [USER, MODEL], "rejected": [{"role": "user", "content": "Other"}, MODEL]},
            "chosen and rejected answer different prompts",
        ),
        (
            {"prompt": "Other", "chosen": [USER, MODEL], "rejected": [USER, MODEL]},
            "chosen has 1 messages before its answer, and they are not the prompt",
        ),
        ({"image": "none.png", "prompt": "a", "suffix": "b"}, "image 'none.png': there is no file"),
        ({"image": [], "prompt": "a", "suffix": "b"}, "image is an empty list"),
        ({"image": "data.jsonl", "suffix": "b"}, "prompt is missing or null, not a text"),
        ({"files": []}, "files is a list []; it must be a list of files"),
        ({"files": [{"path": "a"}]}, "no files[0].text among the fields 'path'"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_a_record_that_has_not_its_form(tmp_path, record, message):
    assert wrong(tmp_path, json.dumps(record)).startswith(f"data.jsonl:1: {message}")


def test_a_file_may_mix_forms_unless_one_is_asked_for(tmp_path):
    data = open_data(lines(tmp_path, GOOD, "", '{"text": "a"}', GOOD))
    assert data.forms == {"chat": 0, "text": 1}
    assert data.report() == "3 records of the form chat and text"
    assert (
        wrong(tmp_path, GOOD, "", '{"text": "a"}', form="chat") == "data.jsonl:3: no messages among the fields 'text'"
    )


def test_a_form_that_is_asked_for(tmp_path):
    both = json.dumps({"text": "all of it", "prompt": "a"})
    assert open_data(lines(tmp_path, both)).form == "text"
    assert open_data(lines(tmp_path, both), "prompt").form == "prompt"
    assert wrong(tmp_path, GOOD, form="text") == "data.jsonl:1: no text among the fields 'messages'"
    with pytest.raises(ConfigError, match="form='chats' is no form of training data; did you mean chat"):
        open_data(lines(tmp_path, GOOD), "chats")


# ---------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "broken JSON at column 15, Expecting value: '{\"messages\": ['"),
        (GOOD[:-1] + ', "a" 1}', "broken JSON at column"),
        ("[1, 2]", "a list, where each line is one object with named fields"),
        ('"text"', "a text, where each line"),
        ("17", "a number, where each line"),
        ("null", "null, where each line"),
        (GOOD.encode().replace(b"Hi", b"H\0i"), "a NUL byte at column"),
        (GOOD.encode().replace(b"Hi", b"H\xe9"), "byte 0xE9 at column"),
        ("\ufeff" + GOOD, "broken JSON at column 1"),  # inside of a file it is no mark
        ("[" * 100_000, "JSON that cannot be read: maximum recursion depth"),
        ('{"n": ' + "9" * 5000 + "}", "JSON that cannot be read: Exceeds the limit"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, line, message):
    assert wrong(tmp_path, GOOD, GOOD, line, GOOD).startswith(f"data.jsonl:3: {message}")


def test_what_editors_leave_is_read_over(tmp_path):
    """A byte order mark at the head, CRLF, blank lines, no line break at the end."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n  \n{GOOD}".encode())
    data = open_data(path)
    assert [data[i] for i in range(2)] == [CHAT, CHAT]
    assert (data.where(0), data.where(1)) == (f"{path}:1", f"{path}:4")
    assert data[-1] == CHAT
    with pytest.raises(IndexError, match="record 2 of 2"):
        data[2]


def test_utf_16_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(DataError, match=r":1: the file is UTF-16; save it as UTF-8"):
        open_data(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="empty, without any record"):
        open_data(path)


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD", 1 << 20)
    long = json.dumps({"messages": [USER, {"role": "assistant", "content": "x" * (3 << 20)}]})
    assert wrong(tmp_path, GOOD, long, GOOD) == "data.jsonl:2: a line of more than 1 MiB; break the record up"
    data = open_data(lines(tmp_path, *[GOOD] * 60, long, *[GOOD] * 60), on_bad="skip")
    assert (len(data), len(data.bad)) == (120, 1)
    assert data.where(60).endswith(":62")
    assert data[60] == CHAT


# ---------------------------------------------------------------- what is skipped


def test_bad_records_are_skipped_counted_and_told(tmp_path):
    path = lines(tmp_path, *[GOOD] * 150, "{", *[GOOD] * 49)
    data = open_data(path, on_bad="skip")
    assert data.report() == "199 records of the form chat; 1 bad ones skipped (0.50%)"
    assert data.bad[0].startswith(f"{path}:151: broken JSON")
    assert data.where(150) == f"{path}:152"


def test_more_than_one_in_a_hundred_is_another_kind_of_file(tmp_path):
    path = lines(tmp_path, *[GOOD] * 97, "{", "[]", "{")
    with pytest.raises(DataError, match=r"3 bad ones skipped \(3.00%\); more than 1% is not a few .* the first: .*:98"):
        open_data(path, on_bad="skip")
    with pytest.raises(DataError, match=r":1: broken JSON .*; no good record in"):
        open_data(lines(tmp_path, "{", "{"), on_bad="skip")
    with pytest.raises(ConfigError, match="on_bad='stop' must be 'error' or 'skip'"):
        open_data(path, on_bad="stop")


# ---------------------------------------------------------------- Parquet


def parquet(path, records, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return path


def test_parquet_is_read_row_by_row(tmp_path):
    records = [{"messages": [USER, {"role": "assistant", "content": str(i)}], "note": None} for i in range(10)]
    data = open_data(parquet(tmp_path / "a.parquet", records, row_group_size=3))
    assert (data.form, len(data)) == ("chat", 10)
    for i in np.random.default_rng(0).permutation(10):
        assert data[i] == {"messages": records[i]["messages"]}
    assert data.where(7) == f"{tmp_path / 'a.parquet'}, row 8"


def test_few_row_groups_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_TABLES", 1)
    data = open_data(parquet(tmp_path / "a.parquet", [{"text": str(i)} for i in range(9)], row_group_size=3))
    assert [data[i]["text"] for i in (8, 0, 4, 8)] == ["8", "0", "4", "8"]
    assert len(data._sources[0]._tables) == 1


def test_a_bad_row_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}, {"text": "c"}], row_group_size=1)
    with pytest.raises(DataError, match=r"a.parquet, row 2: the fields \(none\) make no form"):
        open_data(path)


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_a_damaged_parquet_file(tmp_path, cut):
    path = parquet(tmp_path / "a.parquet", [{"text": "a"}])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file, or damaged"):
        open_data(path)


def test_pictures_inside_of_a_parquet_file(tmp_path):
    image = {"bytes": b"\x89PNG", "path": "a.png"}
    data = open_data(parquet(tmp_path / "a.parquet", [{"image": image, "prompt": "p", "suffix": "s"}]))
    assert data[0]["image"] == [b"\x89PNG"]


def test_parquet_needs_its_extra(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"reading Parquet .* needs the extra \[train\]"):
        open_data(path)


# ---------------------------------------------------------------- folders, documents, the hub


def test_a_folder_of_data_files(tmp_path):
    (tmp_path / "part").mkdir()
    lines(tmp_path / "part", json.dumps({"text": "b"}))
    lines(tmp_path, json.dumps({"text": "a"}), name="a.ndjson")
    parquet(tmp_path / "c.parquet", [{"text": "c"}])
    (tmp_path / "README.md").write_text("not a record, beside data files")
    (tmp_path / ".hidden.jsonl").write_text("{")
    assert [record["text"] for record in open_data(tmp_path)] == ["a", "c", "b"]
    assert [record["text"] for record in open_data(f"{tmp_path}/*/*.jsonl")] == ["b"]
    assert [record["text"] for record in open_data([tmp_path / "c.parquet", tmp_path / "a.ndjson"])] == ["c", "a"]


def test_a_folder_of_source_code(tmp_path):
    (tmp_path / "pkg" / "__pycache__").mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "__pycache__" / "a.py").write_text("x")
    (tmp_path / "pkg" / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.bin").write_bytes(b"\0")
    data = open_data(tmp_path)
    assert [dict(record) for record in data] == [
        {"text": "text", "path": "b.txt"},
        {"text": "x = 1\r\n", "path": "pkg/a.py"},
    ]
    assert data.where(1) == str(tmp_path / "pkg" / "a.py")
    (tmp_path / "pkg" / "d.py").write_bytes(b"a\n\n\xff\n")
    with pytest.raises(DataError, match=r"d\.py: byte 0xFF in line 3 is not UTF-8"):
        open_data(tmp_path)


def test_one_text_file_is_one_record(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Call me Ishmael.")
    assert open_data(path)[0] == {"text": "Call me Ishmael.", "path": "book.txt"}
    path.write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"book.txt: a NUL byte at 1"):
        open_data(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"book.txt: empty"):
        open_data(path)


def test_a_repository_comes_in_groups(tmp_path):
    (tmp_path / "use.py").write_text("import base\n" + "# u\n" * 10)
    (tmp_path / "base.py").write_text("x = 1\n" * 10)
    (tmp_path / "test_use.py").write_text("import use\n")
    data = open_data(tmp_path, "files")
    assert [[file["path"] for file in record["files"]] for record in data] == [["base.py", "use.py", "test_use.py"]]
    data = open_data(tmp_path, "files", group_bytes=70)
    assert [[file["path"] for file in record["files"]] for record in data] == [["base.py"], ["use.py", "test_use.py"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "there is no file or folder"),
        ("https://example.com/a.jsonl", "is a URL; data is read from files, folders and hub:owner/name"),
        ("a.xlsx", r"\.xlsx files are not read; write JSON lines"),
        ("a.jsonl.gz", "is compressed; unpack it first"),
        ("empty", "a folder without .jsonl, .csv or .parquet files"),
    ],
)
def test_what_is_no_data(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    for file in ("a.xlsx", "a.jsonl.gz"):
        (tmp_path / file).write_text("x")
    with pytest.raises(DataError, match=message):
        open_data(name if "://" in name else tmp_path / name)


def test_the_hub(monkeypatch, tmp_path):
    """Names go to the hub's client as they should; offline, as here, what is not in its cache is an error that says
    so."""
    with pytest.raises(DataError, match="if a data set on the hub is meant, write hub:owner/name"):
        open_data("owner/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AccessError, match="owner/name is not in the local cache"):
        open_data("hub:owner/name")
    with pytest.raises(AccessError, match="is not a hub id"):
        open_data("hub:owner")
    asked = []
    lines(tmp_path, GOOD)
    monkeypatch.setattr(files.hub, "download_data", lambda *a: asked.append(a) or tmp_path)
    assert len(open_data("hub:owner/name")) == len(open_data("hub:owner/name/data.jsonl")) == 1
    assert asked == [
        ("owner/name", ["*.jsonl", "*.ndjson", "*.csv", "*.tsv", "*.parquet"]),
        ("owner/name", ["data.jsonl"]),
    ]
    with pytest.raises(DataError, match=r"no x\.jsonl in that data set"):
        open_data("hub:owner/name/x.jsonl")


# ---------------------------------------------------------------- the fingerprint


def test_the_fingerprint_is_of_the_content(tmp_path):
    path = lines(tmp_path, GOOD, GOOD)
    first = open_data(path).fingerprint
    assert open_data(path.rename(tmp_path / "other.jsonl")).fingerprint == first
    assert open_data(lines(tmp_path, GOOD, GOOD.replace("Hi", "Ho"))).fingerprint != first
    assert len(first) == 64


def test_a_file_that_changes_while_it_is_used(tmp_path):
    path = lines(tmp_path, GOOD, GOOD)
    data = open_data(path)
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"data.jsonl:2: .*; it was read before, so the file has changed"):
        data[1]


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_read_or_raise(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("d") / "data.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        open_data(path)
