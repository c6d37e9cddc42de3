"""What the recipes share: small tokenizers and new models in the family's own layout, and what measurements look like.

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
import torch

from gemkit import family
from gemkit.nn import Decoder, PaliGemma, build
from gemkit.text import Tokenizer
from gemkit.text.vocabulary import INFILL

HERE = Path(__file__).parent
TOKENIZERS = HERE / "tokenizers"
DOCS = HERE.parent / "docs"

# The first pieces of Gemma 1's vocabulary, in order: control tokens, then runs of newlines and of spaces. With these the
# ids that people know by heart (2, 67 to 70, 106, 107, 108) are the same in a small vocabulary.
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


def new_model(config: family.Decoder, vision: family.Vision | None = None, *, seed: int) -> Decoder | PaliGemma:
    """A model with random weights: normal with a standard deviation of 1 / sqrt(inputs), in the last projection of each
    branch divided by sqrt(2 * layers) so that all branches together add no more than one would; norms and biases 0.

    The decay of a recurrence is drawn as Griffin's is (arXiv:2402.19427): the state keeps 0.9 to 0.999 of itself.
    """
    model = build(config, vision)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            in_tower = "vision_tower" in name
            if name.endswith("recurrent_param"):
                kept = torch.empty_like(weight).uniform_(0.9**2, 0.999**2, generator=generator).sqrt()
                weight.copy_(torch.log(1 / kept - 1))
            elif name.endswith("bias") or weight.dim() == 1:
                # the norms of the tower are factors, those of the decoder are added to 1
                weight.fill_(float(in_tower and "norm" in name and name.endswith("weight")))
            elif "position_embedding" in name:
                weight.normal_(0, 0.02, generator=generator)
            elif "conv_1d" in name:
                weight.normal_(0, (0.01 / weight.shape[1]) ** 0.5, generator=generator)
            else:
                inputs = weight.shape[1] if "gate.weight" in name else weight[0].numel()
                depth = vision.depth if vision is not None and in_tower else len(config.layers)
                is_last = name.split(".")[-2] in ("o_proj", "down_proj", "out_proj", "fc2", "linear_out")
                weight.normal_(0, (inputs * (2 * depth if is_last else 1)) ** -0.5, generator=generator)
    return model


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
