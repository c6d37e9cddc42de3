"""Sources of records, one class for each kind of file: JSON lines, texts, repositories of code, Parquet, memory."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from gemkit.errors import ConfigError, DataError, MissingExtraError
from gemkit.train.data import repo_order

Place: TypeAlias = tuple[int, int]  # where a record is in its source: what it means, the source knows

MAX_RECORD = 64 * 2**20  # bytes of a line or of a document
_TABLES = 256 * 2**20  # bytes of a Parquet file that are kept decoded


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
                elif line.strip() not in (b"", b"\xef\xbb\xbf"):
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
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError("the file is UTF-16; save it as UTF-8")
        line = line.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in line:
        raise DataError(f"a NUL byte at column {line.index(0) + 1}: the file is damaged, or no text")
    try:
        record = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"byte 0x{line[error.start]:02X} at column {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        if line.lstrip().startswith(b"[") and first:
            raise DataError(
                "a list that goes over lines, not JSON lines: write one object a line (jq -c '.[]' does)"
            ) from None
        end = line.decode().rstrip()
        shown = end if len(end) <= 40 else end[:37] + "..."
        raise DataError(f"broken JSON at column {error.colno}, {error.msg}: {shown!r}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"JSON that cannot be read: {error}") from None
    if not isinstance(record, dict):
        kinds = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
        raise DataError(f"{kinds.get(type(record), 'null')}, where each line is one object with named fields")
    return record


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
        data = file.read(MAX_RECORD + 1).removeprefix(b"\xef\xbb\xbf")
    if b"\0" in data:
        raise DataError(f"a NUL byte at {data.index(0)}: the file is damaged, or no text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"byte 0x{data[error.start]:02X} in line {line} is not UTF-8") from None


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
