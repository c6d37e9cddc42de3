"""Files to records: JSON, CSV, Parquet, texts and source code, from folders or the hub; each record checked once.

`open_data` reads everything once from beginning to end: it finds where each record is, checks it, and takes the
SHA-256 of what it read, by which a run that is resumed knows its data again. After that a record is read where it
stands, when it is asked for; a file is never in memory whole.

Decided here, for all callers:

- Each record has the dialect that its fields show (`dialects.py`), of the form that is asked for, if one is.
- A byte order mark at the head of a file and CRLF line ends are read over; blank lines are no records.
- Of a folder, its .jsonl, .ndjson, .csv, .tsv and .parquet files are read; if it has none, its texts and source code
  are, each file a record. Hidden files and folders are left out, and so are empty files of source code.
- `on_bad="skip"` leaves bad records out and says how many; more than 1 % of them, and the file is not what was meant.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gemkit.errors import ConfigError, DataError
from gemkit.text import Tokenizer
from gemkit.train.data import dialects, schemas
from gemkit.train.data.messages import Account
from gemkit.train.data.sources import (
    Documents,
    JsonList,
    Lines,
    Memory,
    Parquet,
    Place,
    Repository,
    Source,
    Table,
    is_list,
)
from gemkit.weights import hub

Paths: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"

MAX_BAD = 0.01  # of all records, that may be skipped
GROUP_BYTES = 24 * 2**10  # of files in one record of the form "files": about the 8192 tokens that CodeGemma sees
_LINES = (".jsonl", ".ndjson")
_DATA = (*_LINES, ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar")
_TABLES = {".csv": ",", ".tsv": "\t"}
_OTHERS = (".arrow", ".feather", ".xlsx", ".xls", ".db", ".sqlite", ".pkl", ".pt", ".npy")
# what the vocabularies of the family have as control tokens, and texts of other tools spell
_CONTROL = re.compile(
    r"<(?:bos|eos|pad|(?:start|end)_of_(?:turn|image)|image_soft_token|\|fim_(?:prefix|middle|suffix)\||"
    r"\|file_separator\|)>"
)
# fmt: off
_TEXTS = frozenset((
    ".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".java", ".kt", ".js", ".jsx",
    ".mjs", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".cs", ".swift", ".scala", ".sh", ".sql", ".html", ".css",
    ".lua", ".pl", ".r", ".jl", ".hs", ".ml", ".ex", ".erl", ".toml", ".yaml", ".yml",
))
# fmt: on
_HUB = "hub:"


class Data(Sequence[dict[str, Any]]):
    """Checked records. `data[i]` reads record i anew; `data.where(i)` says where it stands.

    Attributes:
        forms: those of the records, of `schemas.FORMS`, each with the number of its first record.
        fingerprint: SHA-256 of what was read, in the order in which it was, and of how it was read. Neither the names
            of data files nor the contents of images are part of it.
        on_bad: what is done about a bad record.
        bad: what was wrong with each that was skipped, in words with its place.
        dialects: how many records are of each dialect.
        unused: how many records have each field that nothing reads.
        changed: how many records were changed, by what was done to them.
        spelled: how many records have texts that spell each control token.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        form: str | None,
        on_bad: Literal["error", "skip"] = "error",
        columns: Mapping[str, str] | None = None,
    ):
        if on_bad not in ("error", "skip"):
            raise ConfigError(f"on_bad={on_bad!r} must be 'error' or 'skip'")
        self._asked = "" if form is None else schemas.known(form)
        self._columns = dict(columns or {})
        dialects.check_columns(self._columns)
        self.on_bad = on_bad
        self.forms: dict[str, int] = {}
        self.bad: list[str] = []
        self.dialects: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.spelled: Counter[str] = Counter()
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
        digest.update(repr((self._asked, sorted(self._columns.items()))).encode())
        self.fingerprint: str = digest.hexdigest()

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], form: str | None = None) -> Data:
        """Records that are in memory already, checked as those of a file are."""
        return cls([Memory(records)], form)

    @property
    def form(self) -> str:
        """The form of the first record."""
        return next(iter(self.forms), self._asked)

    def _take(self, source: Source, places: tuple[array, array], place: Place, raw: Any) -> None:
        account = Account()
        try:
            if isinstance(raw, DataError):
                raise raw
            dialect, record = self._read(raw, source, account)
        except DataError as error:
            message = f"{source.where(place)}: {error}"
            if self.on_bad == "error":
                raise DataError(message) from None
            self.bad.append(message)
            return
        self.forms.setdefault(dialect.form, sum(self.dialects.values()))
        self.dialects[dialect.name] += 1
        self.unused.update(account.unused.keys())
        self.changed.update(account.changed.keys())
        self.spelled.update({found for text in _texts(record) for found in _CONTROL.findall(text)})
        for column, number in zip(places, place, strict=True):
            column.append(number)

    def _read(
        self, raw: Mapping[str, Any], source: Source, account: Account
    ) -> tuple[dialects.Dialect, dict[str, Any]]:
        record = dialects.rename(raw, self._columns)
        dialect = dialects.find(record, self._asked)
        return dialect, dialects.read(dialect, record, source.folder, account)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # one record: slices are not read
        source, place = self._find(index)
        try:
            return self._read(source.read(place), source, Account())[1]
        except (DataError, OSError, KeyError, IndexError) as error:
            raise DataError(f"{source.where(place)}: {error}; it was read before, so the file has changed") from None

    def where(self, index: int) -> str:
        """The file and the line, row or document of a record, for messages."""
        source, place = self._find(index)
        return source.where(place)

    def report(self) -> str:
        """What was read, in a line."""
        found = f"{len(self):,} records of the form {' and '.join(self.forms) or '(none)'}"
        if not self.bad:
            return found
        return f"{found}; {len(self.bad):,} bad ones skipped ({len(self.bad) / (len(self) + len(self.bad)):.2%})"

    def account(self, tokenizer: Tokenizer, *, as_control: bool = False, uses: Collection[str] = ()) -> Iterator[str]:
        """Lines on how records are understood: their dialects and what is learned, fields without effect, changes.

        Args:
            tokenizer: whose control tokens may be spelled.
            as_control: whether texts that spell them are trained as them.
            uses: fields that the objective reads besides those of the form.
        """
        for name, count in self.dialects.most_common():
            dialect = dialects.BY_NAME[name]
            yield f"{count:,} records of {name} (form {dialect.form}): {dialect.learned}"
        if unused := [f"{name} ({n:,})" for name, n in self.unused.most_common() if name not in uses]:
            yield f"fields that nothing reads: {', '.join(unused)}"
        for what, count in self.changed.most_common():
            yield f"{count:,} records {what}"
        control = [piece for piece in self.spelled if piece in tokenizer and tokenizer.is_control(tokenizer.id(piece))]
        if control:
            how = "trained as the tokens" if as_control else "trained as text; --control trains them as the tokens"
            found = ", ".join(f"{name} ({self.spelled[name]:,})" for name in control)
            yield f"records whose text spells control tokens, {how}: {found}"

    def __repr__(self) -> str:
        return f"Data({self.report()})"

    def _find(self, index: int) -> tuple[Source, Place]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"record {index} of {count}")
        index %= count
        which = bisect_right(self._ends, index)
        firsts, seconds = self._places[which]
        at = index - (self._ends[which] - len(firsts))
        return self._sources[which], (firsts[at], seconds[at])


def _texts(value: Any) -> Iterator[str]:
    """All texts of a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def open_data(
    paths: Paths,
    form: str | None = None,
    on_bad: Literal["error", "skip"] = "error",
    *,
    columns: Mapping[str, str] | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Data:
    """Records from files, found and checked.

    Args:
        paths: one or several of: a file, a folder, a pattern such as "data/*.jsonl", or "hub:owner/name" for the data
            files of a data set on the hub, "hub:owner/name/part.jsonl" for one of them or some by a pattern.
        form: of the records; by default as each of them shows. "files" makes each folder one repository, whose files
            are ordered by what they import (`repo_order.order`) and come in groups.
        on_bad: "error" stops at the first bad record, "skip" leaves it out.
        columns: where fields have other names: `{"prompt": "question_en"}` reads that column as the prompt.
        group_bytes: of the form "files": how much text a record has, unless one file has more.

    Raises:
        DataError: if a file is broken or a record bad, with the line; if there is nothing.
        MissingExtraError: if a Parquet file is read without pyarrow.
        AccessError: if the hub does not give what was asked for.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else [*paths]
    if not given:
        raise ConfigError("no files of training data were named")
    return Data([source for path in given for source in _sources(path, form, group_bytes)], form, on_bad, columns)


def _sources(path: str | os.PathLike[str], form: str | None, group_bytes: int) -> list[Source]:
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
    folder = hub.download_data(f"{owner}/{repo}", [pattern] if pattern else [f"*{end}" for end in _DATA])
    if pattern:
        files = sorted(folder.glob(pattern)) if ".." not in Path(pattern).parts else []
    else:
        files = [file for file in _below(folder) if _is_data(file)]
    if not files:
        raise DataError(
            f"{name}: no {pattern or '.jsonl, .csv or .parquet files'} in that data set; name a file that it has"
        )
    return files


def _below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without what is hidden or made by Python. Linked folders are not entered."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in _DATA


def _folder(folder: Path, form: str | None, group_bytes: int) -> list[Source]:
    files = _below(folder)
    if data := [file for file in files if _is_data(file)]:
        return [_file(file) for file in data]
    texts = [file for file in files if file.suffix.lower() in _TEXTS and file.is_file() and file.stat().st_size]
    if not texts:
        raise DataError(f"{folder}: a folder without .jsonl, .csv or .parquet files, texts or source code")
    if form == "files":
        return [Repository(folder, texts, group_bytes)]
    return [Documents(folder, texts)]


def _file(path: Path) -> Source:
    end = path.suffix.lower()
    if not path.is_file():
        raise DataError(f"{path} is no regular file")
    if end == ".parquet":
        return Parquet(path)
    if end in (*_LINES, ".json"):
        return JsonList(path) if is_list(path) else Lines(path)
    if end in _TABLES:
        return Table(path, _TABLES[end])
    if end in _PACKED:
        raise DataError(f"{path} is compressed; unpack it first, so that each record can be read where it stands")
    if end in _OTHERS:
        raise DataError(f"{path}: {end} files are not read; write JSON lines (.jsonl) or Parquet")
    if not path.stat().st_size:
        raise DataError(f"{path}: empty, without any record")
    return Documents(path.parent, [path])
