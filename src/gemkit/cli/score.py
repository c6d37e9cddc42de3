"""`gemkit score`: how likely a model finds a text."""

from __future__ import annotations

import argparse
import json
from typing import Any

from gemkit.cli.common import add_model, add_output, load_model, printable, read_text, say, verb
from gemkit.errors import ConfigError

_EXAMPLES = """\
  gemkit score "The capital of France is Paris."
  gemkit score --tokens "The capital of France is Berlin."
  gemkit score -m gemma-2-2b --file README.md --json"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "score", "log-probability of each token of a text, and its perplexity", _EXAMPLES)
    parser.add_argument("text", nargs="?", help="the text")
    parser.add_argument("-f", "--file", help="read it from a file, - for stdin")
    parser.add_argument("--tokens", action="store_true", help="a line for each token")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="with each token its N likeliest alternatives")
    parser.add_argument("--beyond-context", action="store_true", help="go on past the trained context")
    add_model(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if (args.text is None) == (args.file is None):
        raise ConfigError("give one text: as an argument, or with --file")
    text = args.text if args.file is None else read_text(args.file)
    if args.beyond_context:
        say("beyond the trained context quality is undefined: the model has never seen these positions")
    model = load_model(args)
    score = model.score(text, top=args.top, beyond_context=args.beyond_context)
    piece = model.tokenizer.piece
    predicted = [entry for entry in score.logprobs if entry is not None]
    if args.json:
        tokens = [
            {
                "id": entry.id,
                "piece": piece(entry.id),
                "logprob": entry.logprob,
                "top": [{"id": i, "piece": piece(i), "logprob": p} for i, p in entry.top],
            }
            for entry in predicted
        ]
        report = {
            "model": model.label,
            "tokens": tokens,
            "total_logprob": score.total,
            "perplexity": score.perplexity,
        }
        print(json.dumps(report, ensure_ascii=False))
        return 0
    if args.tokens or args.top:
        for entry in predicted:
            others = "".join(f"  {piece(i)!r} {p:.3f}" for i, p in entry.top)
            print(printable(f"{entry.logprob:9.4f}  {entry.id:>6}  {piece(entry.id)!r}{others}", args.raw))
    perplexity = "undefined" if score.perplexity is None else f"{score.perplexity:.4f}"
    print(f"perplexity {perplexity} over {len(predicted)} tokens; log-probability {score.total:.4f} nats")
    return 0
