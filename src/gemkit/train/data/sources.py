"""Sources of records, one class for each kind of file: JSON lines and lists, CSV, texts, repositories, Parquet."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from gemkit.errors import ConfigError, DataError, MissingExtraError, TextError
from gemkit.files import decode_text
from gemkit.train.data import repo_order
from gemkit.train.data.schemas import listed

Place: TypeAlias = tuple[int, int]  # where a record is in its source: what it means, the source knows

MAX_RECORD = 64 * 2**20  # bytes of a line or of a document
_TABLES = 256 * 2**20  # bytes of a Parquet file that are kept decoded
_MARK = b"\xef\xbb\xbf"  # that some editors put before UTF-8
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_JSON = json.JSONDecoder()


class Source(Protocol):
    """A file, or several, of records. `scan` comes first and once."""

    name: str
    folder: Path  # where paths in its records start

    def scan(self) -> Iterator[tuple[Place, Mapping[str, Any] | DataError]]:
        """Each record with its place, or what is wrong with what is there."""
        ...

    def digest(self) -> bytes:
        """SHA-256 of what `scan` read."""
        ...

    def read(self, place: Place) -> Mapping[str, Any]: ...

    def where(self, place: Place) -> str: ...


class Memory:
    """Records in a list. A place is (index, 0)."""

    name, folder = "the records given", Path()

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self._records = records

    def scan(self) -> Iterator[tuple[Place, Mapping[str, Any] | DataError]]:
        for i, record in enumerate(self._records):
            wrong = DataError(f"is {type(record).__name__}, not a dict")
            yield (i, 0), record if isinstance(record, Mapping) else wrong

    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for record in self._records:
            digest.update(repr(record).encode(errors="backslashreplace"))
        return digest.digest()

    def read(self, place: Place) -> Mapping[str, Any]:
        return self._records[place[0]]

    def where(self, place: Place) -> str:
        return f"record {place[0]}"


class Lines:
    """JSON lines. A place is (byte at which the line begins, its number)."""

    def __init__(self, path: Path):
        self.name, self.folder, self._path = str(path), path.parent, path
        self._digest = hashlib.sha256()

    def scan(self) -> Iterator[tuple[Place, Mapping[str, Any] | DataError]]:
        with _opened(self._path) as file:
            at, number = 0, 0
            while line := file.readline(MAX_RECORD + 1):
                number += 1
                self._digest.update(line)
                place, at = (at, number), at + len(line)
                if len(line) > MAX_RECORD and not line.endswith(b"\n"):
                    while (rest := file.readline(MAX_RECORD)) and not rest.endswith(b"\n"):
                        self._digest.update(rest)
                        at += len(rest)
                    self._digest.update(rest)
                    at += len(rest)
                    yield place, DataError(f"a line of more than {MAX_RECORD >> 20} MiB; break the record up")
                elif line.strip() not in (b"", _MARK):
                    try:
                        yield place, _parse(line, first=place[0] == 0)
                    except DataError as error:
                        yield place, error

    def digest(self) -> bytes:
        return self._digest.digest()

    def read(self, place: Place) -> Mapping[str, Any]:
        with _opened(self._path) as file:
            file.seek(place[0])
            return _parse(file.readline(MAX_RECORD + 1), first=place[0] == 0)

    def where(self, place: Place) -> str:
        return f"{self.name}:{place[1]}"


def _parse(line: bytes, *, first: bool) -> Mapping[str, Any]:
    """One line of JSON lines. `first`: it is the first of its file, before which an editor may put a mark."""
    if first:
        if line.startswith(_UTF_16):
            raise DataError("the file is UTF-16; save it as UTF-8")
        line = line.removeprefix(_MARK)
    if b"\0" in line:
        raise DataError(f"a NUL byte at column {line.index(0) + 1}: the file is damaged, or no text")
    try:
        record = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"byte 0x{line[error.start]:02X} at column {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        end = line.decode().rstrip()
        shown = end if len(end) <= 40 else end[:37] + "..."
        over = " (one object over several lines? write each on one line, or all in a list)" if end == "{" else ""
        raise DataError(f"broken JSON at column {error.colno}, {error.msg}: {shown!r}{over}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"JSON that cannot be read: {error}") from None
    return _object(record, "line")


def _object(record: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        kinds = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
        raise DataError(f"{kinds.get(type(record), 'null')}, where each {place} is one object with named fields")
    return record


def is_list(path: Path) -> bool:
    """Whether a file of JSON is one list, and not an object a line."""
    try:
        with open(path, "rb") as file:
            return file.read(1024).removeprefix(_MARK).lstrip().startswith(b"[")
    except OSError:
        return False


class JsonList:
    """One JSON list of records, decoded a part at a time. A place is (byte at which the entry begins, its number)."""

    def __init__(self, path: Path):
        self.name, self.folder, self._path = str(path), path.parent, path
        self._digest = hashlib.sha256()
        self._sizes = array("q")  # bytes of each entry

    def scan(self) -> Iterator[tuple[Place, Mapping[str, Any] | DataError]]:
        with _opened(self._path) as file:
            part = _Part(file, self._digest)
            part.expect("[")
            if part.peek() != "]":
                while True:
                    start, record = part.at, part.value()
                    place = (start, len(self._sizes))
                    self._sizes.append(part.at - start)
                    try:
                        yield place, _object(record, "entry")
                    except DataError as error:
                        yield place, error
                    if part.peek() != ",":
                        break
                    part.expect(",")
                    part.peek()
            part.expect("]")
            if rest := part.peek():
                raise part.broken(f"{rest!r} after the end of the list")

    def digest(self) -> bytes:
        return self._digest.digest()

    def read(self, place: Place) -> Mapping[str, Any]:
        with _opened(self._path) as file:
            file.seek(place[0])
            text = file.read(self._sizes[place[1]])
        try:
            return _object(json.loads(text), "entry")
        except ValueError as error:
            raise DataError(str(error)) from None

    def where(self, place: Place) -> str:
        return f"{self.name}, entry {place[1] + 1}"


class _Part:
    """The part of a JSON text that is in memory: it grows until what is asked for is in it."""

    def __init__(self, file: Any, digest: Any):
        self._file, self._digest, self._name = file, digest, file.name
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._next, self._lines = "", 0, 1
        self.at = 0  # the byte at which what comes next begins
        self._more()
        if self._text.startswith("\ufeff"):
            self._text, self.at = self._text[1:], len(_MARK)

    def _more(self) -> bool:
        """Read on, as much again as is waiting; False at the end of the file."""
        self._lines += self._text.count("\n", 0, self._next)
        self._text, self._next = self._text[self._next :], 0
        data = self._file.read(max(1 << 20, len(self._text)))
        self._digest.update(data)
        try:
            self._text += self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._text += error.object[: error.start].decode()
            raise self.broken(f"byte 0x{error.object[error.start]:02X} is not UTF-8", len(self._text)) from None
        return bool(data)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            start = self._next
            while self._next < len(self._text) and self._text[self._next] in " \t\r\n":
                self._next += 1
            self.at += self._next - start
            if self._next < len(self._text):
                return self._text[self._next]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.broken(f"{found!r} where {character!r} should be" if found else f"the end before {character!r}")
        self._next, self.at = self._next + 1, self.at + 1

    def value(self) -> Any:
        """The value that comes next."""
        self.peek()
        while True:
            try:
                found, end = _JSON.raw_decode(self._text, self._next)
            except json.JSONDecodeError as error:
                if len(self._text) - self._next > MAX_RECORD:
                    raise self.broken(f"an entry of more than {MAX_RECORD >> 20} MiB, or {error.msg}") from None
                if not self._more():
                    raise self.broken(f"broken JSON, {error.msg}", error.pos) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self.broken(f"JSON that cannot be read: {error}") from None
            self.at += len(self._text[self._next : end].encode("utf-8", "surrogatepass"))
            self._next = end
            return found

    def broken(self, what: str, at: int | None = None) -> DataError:
        line = self._lines + self._text.count("\n", 0, self._next if at is None else at)
        return DataError(f"{self._name}:{line}: {what}; nothing after it can be read")


class Table:
    """A table of text with names of columns in its first line. A place is (byte at which a row begins, its line)."""

    def __init__(self, path: Path, separator: str):
        self.name, self.folder, self._path, self._separator = str(path), path.parent, path, separator
        self._digest = hashlib.sha256()
        self._columns: list[str] = []
        csv.field_size_limit(MAX_RECORD)

    def scan(self) -> Iterator[tuple[Place, Mapping[str, Any] | DataError]]:
        with _opened(self._path) as file:
            at = 0
            rows: Any = None

            def lines() -> Iterator[str]:
                nonlocal at
                while line := file.readline(MAX_RECORD + 1):
                    self._digest.update(line)
                    at += len(line)
                    yield self._decoded(line, at == len(line), 0 if rows is None else rows.line_num)

            rows = csv.reader(lines(), delimiter=self._separator, strict=True)
            self._columns = next(rows, [])
            if len(set(self._columns)) < len(self._columns) or not all(self._columns):
                raise DataError(f"{self.name}:1: the names of the columns, {listed(self._columns)}, must differ")
            while True:
                place = (at, rows.line_num + 1)
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    yield place, DataError(f"no row of a table: {error}")
                    continue
                if row is None:
                    return
                try:
                    if row:
                        yield place, self._record(row)
                except DataError as error:
                    yield place, error

    def _decoded(self, line: bytes, first: bool, number: int) -> str:
        if first:
            if line.startswith(_UTF_16):
                raise DataError(f"{self.name}: the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(_MARK)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise DataError(
                f"{self.name}:{number + 1}: byte 0x{byte:02X} is not UTF-8; save the file as UTF-8"
            ) from None

    def _record(self, row: Sequence[str]) -> Mapping[str, Any]:
        if len(row) != len(self._columns):
            raise DataError(f"{len(row)} cells, and {len(self._columns)} columns in the first line")
        return dict(zip(self._columns, row, strict=True))

    def digest(self) -> bytes:
        return self._digest.digest()

    def read(self, place: Place) -> Mapping[str, Any]:
        with _opened(self._path) as file:
            file.seek(place[0])
            lines = (self._decoded(line, False, place[1]) for line in file)
            return self._record(next(csv.reader(lines, delimiter=self._separator, strict=True)))

    def where(self, place: Place) -> str:
        return f"{self.name}:{place[1]}"


class Documents:
    """Texts and source code, a file each. A place is (index of the file, 0)."""

    def __init__(self, folder: Path, paths: Sequence[Path]):
        self.name, self.folder = str(folder if len(paths) > 1 else paths[0]), folder
        self._paths = paths
        self._digest = hashlib.sha256()

    def scan(self) -> Iterator[tuple[Place, Mapping[str, Any] | DataError]]:
        for i in range(len(self._paths)):
            try:
                record = self.read((i, 0))
            except DataError as error:
                yield (i, 0), error
                continue
            for value in record.values():
                self._digest.update(hashlib.sha256(value.encode()).digest())
            yield (i, 0), record

    def digest(self) -> bytes:
        return self._digest.digest()

    def read(self, place: Place) -> Mapping[str, Any]:
        path = self._paths[place[0]]
        return {"text": _document(path), "path": _relative(path, self.folder)}

    def where(self, place: Place) -> str:
        return str(self._paths[place[0]])


class Repository:
    """The files of a repository in the order in which they build on one another, in groups.

    A place is (number of the group's first file in that order, number after its last).
    """

    def __init__(self, folder: Path, paths: Sequence[Path], group_bytes: int):
        if group_bytes < 1:
            raise ConfigError(f"group_bytes={group_bytes} must be 1 or more")
        self.name, self.folder = str(folder), folder
        self._paths, self._group_bytes = {_relative(path, folder): path for path in paths}, group_bytes
        self._order: list[str] = []
        self._digest = hashlib.sha256()

    def scan(self) -> Iterator[tuple[Place, Mapping[str, Any] | DataError]]:
        heads, sizes, wrong = {}, {}, {}
        for name, path in self._paths.items():
            try:
                text = _document(path)
            except DataError as error:
                wrong[name] = error
                continue
            heads[name], sizes[name] = repo_order.head(text), len(text.encode())
            self._digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(text.encode()).digest())
        self._order = [*repo_order.order(heads), *wrong]
        for start, end in repo_order.groups([sizes[name] for name in self._order[: len(heads)]], self._group_bytes):
            yield (start, end), self.read((start, end))
        for i, error in enumerate(wrong.values(), len(heads)):
            yield (i, i + 1), error

    def digest(self) -> bytes:
        return self._digest.digest()

    def read(self, place: Place) -> Mapping[str, Any]:
        return {"files": [{"path": n, "text": _document(self._paths[n])} for n in self._order[slice(*place)]]}

    def where(self, place: Place) -> str:
        return ", ".join(str(self._paths[name]) for name in self._order[slice(*place)])


def _document(path: Path) -> str:
    if path.stat().st_size > MAX_RECORD:
        raise DataError(f"more than {MAX_RECORD >> 20} MiB in one document; split it, or write JSON lines of parts")
    with _opened(path) as file:
        data = file.read(MAX_RECORD + 1)
    try:
        return decode_text(data)
    except TextError as error:
        raise DataError(str(error)) from None


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix().replace("\n", " ")


class Parquet:
    """A Parquet file. A place is (row group, row in it). Decoded row groups are kept up to a size, the newest."""

    def __init__(self, path: Path):
        self.name, self.folder, self._path = str(path), path.parent, path
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise MissingExtraError(f"reading Parquet ({path})", "train") from None
        self._errors = (pyarrow.ArrowException, OSError)
        self._open: Callable[[], Any] = lambda: pyarrow.parquet.ParquetFile(path)
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._firsts: list[int] = []  # the number of the first row of each row group

    def scan(self) -> Iterator[tuple[Place, Mapping[str, Any] | DataError]]:
        try:
            with self._open() as file:
                counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                self._firsts = [0, *accumulate(counts)]
                for group in range(file.num_row_groups):
                    row = 0
                    for part in file.iter_batches(batch_size=256, row_groups=[group]):
                        for record in part.to_pylist():
                            yield (group, row), _without_nulls(record)
                            row += 1
        except self._errors as error:
            raise DataError(f"{self.name}: not a Parquet file, or damaged: {' '.join(str(error).split())}") from None

    def digest(self) -> bytes:
        with _opened(self._path) as file:
            return hashlib.file_digest(file, "sha256").digest()

    def read(self, place: Place) -> Mapping[str, Any]:
        group, row = place
        if group not in self._tables:
            with self._open() as file:
                self._tables[group] = file.read_row_group(group)
            while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > _TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(group)
        return _without_nulls(self._tables[group].slice(row, 1).to_pylist()[0])

    def where(self, place: Place) -> str:
        return f"{self.name}, row {self._firsts[place[0]] + place[1] + 1}"


def _without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """A table has every column in every row: null is what a line of JSON leaves out."""
    return {name: value for name, value in record.items() if value is not None}


def _opened(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
