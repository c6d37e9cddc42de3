"""What the recipes share: small tokenizers that begin as the family's do, and files of records.

A recipe uses the public package alone. What is here would be of no use to anybody who does not start from nothing.
"""

from __future__ import annotations

import ast
import io
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from gemkit.inspect.curves import Curve
from gemkit.text import Tokenizer
from gemkit.text.vocabulary import INFILL

HERE = Path(__file__).resolve().parent
TOKENIZERS = HERE / "tokenizers"

# The first pieces of Gemma 1's vocabulary, in order: control tokens, then runs of newlines and of spaces. With these
# the ids that people know by heart (2, 67 to 70, 106, 107, 108) are the same in a small vocabulary.
_UNUSED = [f"<unused{i}>" for i in range(99)]
FAMILY = [
    *("<mask>", "<2mass>", "[@BOS@]", *_UNUSED, "<start_of_turn>", "<end_of_turn>"),
    *("\n" * n for n in range(1, 32)),
    *("▁" * n for n in range(2, 32)),
]


def small_tokenizer(texts: Iterable[str], pieces: int, *, infill: bool = False) -> Tokenizer:
    """A SentencePiece BPE vocabulary with the family's settings and its first 168 pieces.

    It is the same for the same texts: BPE has no chance in it.

    Args:
        pieces: at most so many; fewer where the texts have no more to merge.
        infill: CodeGemma's names for four of the unused pieces.
    """
    first = [INFILL.get(i, piece) if infill else piece for i, piece in enumerate(FAMILY, 4)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=first,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )
    return Tokenizer.from_model(model.getvalue())


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """One record a line; how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, in order."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def library_files() -> list[Path]:
    """The Python standard library's own files, its tests with them where they are installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "pydoc_data", "encodings", "__pycache__"}  # others' own, and tables
    found = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    return sorted(path for path in found if _is_module(path))


def _is_module(path: Path) -> bool:
    """Some test files are broken on purpose."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return False
    return True


def log(folder: Path | str) -> list[dict[str, Any]]:
    """What a run wrote down: an object for each step, evaluation and set of samples."""
    return list(read_jsonl(Path(folder) / "log.jsonl"))


def curve(name: str, entries: Iterable[Mapping[str, Any]], field: str, every: int = 1) -> Curve:
    """A field of the log by step, each point the mean of so many steps; one of the evaluations by "held_out.loss"."""
    outer, _, inner = field.partition(".")
    points = [(entry["step"], entry[outer][inner] if inner else entry[outer]) for entry in entries if outer in entry]
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    return Curve(name, [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups])


def save_picture(name: str, svg: bytes) -> None:
    """Into `docs/recipes`, where the pages about the recipes show it."""
    folder = HERE.parent / "docs" / "recipes"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(svg)
