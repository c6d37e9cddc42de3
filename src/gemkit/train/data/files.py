"""Files to records: JSON lines, Parquet, texts and source code, from folders or the hub; each record checked once.

`open_data` reads everything once from beginning to end: it finds where each record is, checks it, and takes the
SHA-256 of what it read, by which a run that is resumed knows its data again. After that a record is read where it
stands, when it is asked for; a file is never in memory whole.

Decided here, for all callers:

- The first record says which form all have, unless a form is asked for.
- A byte order mark at the head of a file and CRLF line ends are read over; blank lines are no records.
- Of a folder, its .jsonl, .ndjson and .parquet files are read; if it has none, its texts and source code are, each file
  a record. Hidden files and folders are left out, and so are empty files of source code.
- `on_bad="skip"` leaves bad records out and says how many; more than 1 % of them, and the file is not what was meant.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from gemkit.errors import ConfigError, DataError, MissingExtraError
from gemkit.train.data import repo_order, schemas
from gemkit.weights import hub

Place: TypeAlias = tuple[int, int]  # where a record is in its source: what it means, the source knows
Paths: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"

MAX_RECORD = 64 * 2**20  # bytes of a line or of a document
MAX_BAD = 0.01  # of all records, that may be skipped
GROUP_BYTES = 24 * 2**10  # of files in one record of the form "files": about the 8192 tokens that CodeGemma sees
_TABLES = 256 * 2**20  # bytes of a Parquet file that are kept decoded
_LINES = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar")
_OTHERS = (".csv", ".tsv", ".arrow", ".pkl", ".pt", ".npy")
# fmt: off
_TEXTS = frozenset((
    ".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".java", ".kt", ".js", ".jsx",
    ".mjs", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".cs", ".swift", ".scala", ".sh", ".sql", ".html", ".css",
    ".lua", ".pl", ".r", ".jl", ".hs", ".ml", ".ex", ".erl", ".toml", ".yaml", ".yml",
))
# fmt: on
_HUB = "hub:"


class Data(Sequence[dict[str, Any]]):
    """Checked records of one form. `data[i]` reads record i anew; `data.where(i)` says where it stands.

    Attributes:
        form: the form of all of them, one of `schemas.FORMS`.
        fingerprint: SHA-256 of what was read, in the order in which it was. Neither the names of data files nor the
            contents of images are part of it.
        on_bad: what is done about a bad record.
        bad: what was wrong with each that was skipped, in words with its place.
    """

    def __init__(self, sources: Sequence[_Source], form: str | None, on_bad: Literal["error", "skip"] = "error"):
        if on_bad not in ("error", "skip"):
            raise ConfigError(f"on_bad={on_bad!r} must be 'error' or 'skip'")
        self.form: str = "" if form is None else schemas.known(form)
        self.on_bad = on_bad
        self.bad: list[str] = []
        self._sources = sources
        self._places = [(array("q"), array("q")) for _ in sources]
        digest = hashlib.sha256()
        for source, places in zip(sources, self._places, strict=True):
            for place, raw in source.scan():
                self._take(source, places, place, raw)
            digest.update(source.digest())
        self._ends = [*accumulate(len(firsts) for firsts, _ in self._places)]
        found = ", ".join(source.name for source in sources)
        if not len(self):
            raise DataError(
                f"{self.bad[0]}; no good record in {found}" if self.bad else f"{found}: empty, without any record"
            )
        if len(self.bad) > MAX_BAD * (len(self) + len(self.bad)):
            raise DataError(
                f"{self.report()}; more than {MAX_BAD:.0%} is not a few broken records but another kind of file, "
                f"the first: {self.bad[0]}"
            )
        digest.update(self.form.encode())
        self.fingerprint: str = digest.hexdigest()

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], form: str | None = None) -> Data:
        """Records that are in memory already, checked as those of a file are."""
        return cls([_Memory(records)], form)

    def _take(self, source: _Source, places: tuple[array, array], place: Place, raw: Any) -> None:
        try:
            if isinstance(raw, DataError):
                raise raw
            if not self.form:
                self.form = schemas.detect(raw)
            schemas.check(self.form, raw, source.folder)
        except DataError as error:
            message = f"{source.where(place)}: {error}"
            if self.on_bad == "error":
                raise DataError(message) from None
            self.bad.append(message)
            return
        for column, number in zip(places, place, strict=True):
            column.append(number)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # one record: slices are not read
        source, place = self._find(index)
        try:
            return schemas.check(self.form, source.read(place), source.folder)
        except (DataError, OSError, KeyError, IndexError) as error:
            raise DataError(f"{source.where(place)}: {error}; it was read before, so the file has changed") from None

    def where(self, index: int) -> str:
        """The file and the line, row or document of a record, for messages."""
        source, place = self._find(index)
        return source.where(place)

    def report(self) -> str:
        """What was read, in a line."""
        found = f"{len(self):,} records of the form {self.form or '(none)'}"
        if not self.bad:
            return found
        return f"{found}; {len(self.bad):,} bad ones skipped ({len(self.bad) / (len(self) + len(self.bad)):.2%})"

    def __repr__(self) -> str:
        return f"Data({self.report()})"

    def _find(self, index: int) -> tuple[_Source, Place]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"record {index} of {count}")
        index %= count
        which = bisect_right(self._ends, index)
        firsts, seconds = self._places[which]
        at = index - (self._ends[which] - len(firsts))
        return self._sources[which], (firsts[at], seconds[at])


def open_data(
    paths: Paths,
    form: str | None = None,
    on_bad: Literal["error", "skip"] = "error",
    *,
    group_bytes: int = GROUP_BYTES,
) -> Data:
    """Records from files, found and checked.

    Args:
        paths: one or several of: a file, a folder, a pattern such as "data/*.jsonl", or "hub:owner/name" for the data
            files of a data set on the hub, "hub:owner/name/part.jsonl" for one of them or some by a pattern.
        form: of the records; by default as the first one shows. "files" makes each folder one repository, whose files
            are ordered by what they import (`repo_order.order`) and come in groups.
        on_bad: "error" stops at the first bad record, "skip" leaves it out.
        group_bytes: of the form "files": how much text a record has, unless one file has more.

    Raises:
        DataError: if a file is broken or a record bad, with the line; if there is nothing.
        MissingExtraError: if a Parquet file is read without pyarrow.
        AccessError: if the hub does not give what was asked for.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else [*paths]
    if not given:
        raise ConfigError("no files of training data were named")
    return Data([source for path in given for source in _sources(path, form, group_bytes)], form, on_bad)


def _sources(path: str | os.PathLike[str], form: str | None, group_bytes: int) -> list[_Source]:
    name = os.fspath(path)
    if name.startswith(_HUB):
        return [_file(file) for file in _from_hub(name)]
    if "://" in name:
        raise DataError(f"{name} is a URL; data is read from files, folders and {_HUB}owner/name")
    expanded = os.path.expanduser(name)
    found = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
    if not found:
        hint = f"; if a data set on the hub is meant, write {_HUB}{name}" if hub.is_repo_id(name) else ""
        raise DataError(f"there is no file or folder {name}{hint}")
    folders = [Path(each) for each in found if os.path.isdir(each)]
    files = [_file(Path(each)) for each in found if not os.path.isdir(each)]
    return files + [source for folder in folders for source in _folder(folder, form, group_bytes)]


def _from_hub(name: str) -> list[Path]:
    owner, _, rest = name.removeprefix(_HUB).partition("/")
    repo, _, pattern = rest.partition("/")
    folder = hub.download_data(
        f"{owner}/{repo}", [pattern] if pattern else [f"*{end}" for end in (*_LINES, ".parquet")]
    )
    if pattern:
        files = sorted(folder.glob(pattern)) if ".." not in Path(pattern).parts else []
    else:
        files = [file for file in _below(folder) if _is_data(file)]
    if not files:
        raise DataError(f"{name}: no {pattern or '.jsonl or .parquet files'} in that data set; name a file that it has")
    return files


def _below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without what is hidden or made by Python. Linked folders are not entered."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in (*_LINES, ".parquet")


def _folder(folder: Path, form: str | None, group_bytes: int) -> list[_Source]:
    files = _below(folder)
    if data := [file for file in files if _is_data(file)]:
        return [_file(file) for file in data]
    texts = [file for file in files if file.suffix.lower() in _TEXTS and file.is_file() and file.stat().st_size]
    if not texts:
        raise DataError(f"{folder}: a folder without .jsonl or .parquet files, texts or source code")
    if form == "files":
        return [_Repository(folder, texts, group_bytes)]
    return [_Documents(folder, texts)]


def _file(path: Path) -> _Source:
    end = path.suffix.lower()
    if not path.is_file():
        raise DataError(f"{path} is no regular file")
    if end == ".parquet":
        return _Parquet(path)
    if end in (*_LINES, ".json"):
        return _Lines(path)
    if end in _PACKED:
        raise DataError(f"{path} is compressed; unpack it first, so that each record can be read where it stands")
    if end in _OTHERS:
        raise DataError(f"{path}: {end} files are not read; write JSON lines (.jsonl) or Parquet")
    if not path.stat().st_size:
        raise DataError(f"{path}: empty, without any record")
    return _Documents(path.parent, [path])


# ---------------------------------------------------------------- one kind of source each


class _Source(Protocol):
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


class _Memory:
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


class _Lines:
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


class _Documents:
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


class _Repository:
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


class _Parquet:
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
