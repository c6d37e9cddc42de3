"""Lists of JSON and tables of text: what is read, and what is said of those that are broken, with the place."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import DataError
from gemkit.train.data import open_data, sources

RECORDS = [{"text": f'Nr. {i} größer \u2028 "quoted"\n, and more' + "x" * (i % 7)} for i in range(50)]


def wrong(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        open_data(path)
    return str(error.value).replace(str(path), path.name)


# ── one list ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (" ,\r\n ", ":")}])
def test_a_list_is_read_entry_by_entry(tmp_path, name, options, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(RECORDS, **options).encode() + b"\n")
    data = open_data(path)
    assert [data[i] for i in range(len(data))] == RECORDS
    assert data[-1] == RECORDS[-1]
    assert data.where(7) == f"{path}, entry 8"


@given(st.lists(st.fixed_dictionaries({"text": st.text(min_size=1).filter(str.strip)}), min_size=1), st.integers(1, 9))
def test_entries_may_reach_over_what_is_read_at_once(tmp_path_factory, records, size):
    """Read a few bytes at a time: cut inside of characters, escapes and numbers."""
    path = tmp_path_factory.mktemp("d") / "data.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")

    class Slow:
        def __init__(self, file):
            self._file, self.name = file, file.name

        def read(self, _):
            return self._file.read(size)

    class Digest:
        def update(self, data):
            pass

    with open(path, "rb") as file:
        part = sources._Part(Slow(file), Digest())
        part.expect("[")
        found, places = [], []
        while part.peek() != "]":
            start = part.at
            found.append(part.value())
            places.append((start, part.at))
            if part.peek() == ",":
                part.expect(",")
                part.peek()
    assert found == records
    raw = path.read_bytes()
    assert [json.loads(raw[a:b]) for a, b in places] == records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": }]', "data.json:2: broken JSON, Expecting value; nothing after it"),
        ('[{"text": "a"},\n {"text": "b"},\n]', "data.json:3: broken JSON"),
        ('[{"text": "a"} {"text": "b"}]', "data.json:1: '{' where ']' should be"),
        ('[{"text": "a"}', "data.json:1: the end before ']'"),
        ('[{"text": "a"}]\n\nmore', "data.json:3: 'm' after the end of the list"),
        ('[{"text": "a"}, 3]', "data.json, entry 2: a number, where each entry is one object"),
        ("[" * 100_000, "data.json:1: JSON that cannot be read: maximum recursion depth"),
        (b'[{"text": "a"},\n{"text": "\xe9"}]', "data.json:2: byte 0xE9 is not UTF-8"),
        ("[]", "data.json: empty, without any record"),
        ('{\n  "text": "a"\n}', "data.json:1: broken JSON at column 2"),
    ],
)
def test_a_broken_list(tmp_path, content, message):
    assert wrong(tmp_path / "data.json", content).startswith(message)


def test_an_entry_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD", 1 << 20)
    said = wrong(tmp_path / "data.json", '[{"text": "' + "x" * (9 << 20) + '"}]')
    assert said.startswith("data.json:1: an entry of more than 1 MiB")


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_is_read_row_by_row(tmp_path):
    """As spreadsheets write it: a mark, CRLF, quotes, line breaks and separators inside of cells."""
    path = tmp_path / "data.csv"
    path.write_bytes(
        b'\xef\xbb\xbfinstruction,input,output\r\n"Say ""hi""","a, b\r\nc",hi\r\n\r\n' + "Grüße,,é\r\n".encode()
    )
    data = open_data(path)
    assert data.dialects == {"Alpaca": 2}
    assert [m["content"] for m in data[0]["messages"]] == ['Say "hi"\na, b\r\nc', "hi"]
    assert [m["content"] for m in data[1]["messages"]] == ["Grüße", "é"]
    assert data.where(1) == f"{path}:5"
    tabs = tmp_path / "data.tsv"
    tabs.write_text("prompt\tcompletion\na, b\tc\n")
    assert open_data(tabs)[0] == {"prompt": "a, b", "completion": "c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,id\na\n", "data.csv:2: 1 cells, and 2 columns in the first line"),
        ("text,text\na,b\n", "data.csv:1: the names of the columns, 'text', 'text', must differ"),
        ('text\n"a\nb\n', "data.csv:2: no row of a table: unexpected end of data"),
        (b"text\na\xe9\n", "data.csv:2: byte 0xE9 is not UTF-8"),
        ("text\na\n".encode("utf-16"), "data.csv: the file is UTF-16; save it as UTF-8"),
        ("text\n", "data.csv: empty, without any record"),
        ("", "data.csv: empty, without any record"),
    ],
)
def test_a_broken_table(tmp_path, content, message):
    assert wrong(tmp_path / "data.csv", content).startswith(message)
