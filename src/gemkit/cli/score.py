"""`gemkit score`: how likely a model finds a text."""

from __future__ import annotations

import argparse
from typing import Any

from gemkit.cli.options import BEYOND_CONTEXT, add_model, add_output, load_model, texts, verb
from gemkit.cli.output import count, logprob_json, print_json, printable, say
from gemkit.errors import ConfigError

_EXAMPLES = """\
  gemkit score "The capital of France is Paris."
  gemkit score --tokens "The capital of France is Berlin."
  gemkit score -m gemma-2-2b --file README.md --json
  gemkit score -m runs/reward --prompt "Why is the sky blue?" "It scatters blue light."
"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "score", "log-probability of each token of a text, and its perplexity", _EXAMPLES)
    parser.add_argument("text", nargs="?", help="the text, - for stdin")
    parser.add_argument("-f", "--file", metavar="PATH", help="read it from a file, - for stdin")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what it answers, for a reward model")
    parser.add_argument("--tokens", action="store_true", help="a line for each token")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="with each token its N likeliest alternatives")
    parser.add_argument("--beyond-context", action="store_true", help="go on past the trained context")
    add_model(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.text is not None and args.file is not None:
        raise ConfigError("give one text: as an argument, or with --file")
    found = texts([] if args.text is None else [args.text], [] if args.file is None else [args.file])
    if not found:
        raise ConfigError("there is no text: give one as an argument, with --file, or by a pipe")
    (text,) = found
    if args.top < 0:
        raise ConfigError(f"--top {args.top} must not be negative")
    if args.beyond_context:
        say(BEYOND_CONTEXT)
    model = load_model(args)
    score = model.score(text, top=args.top, beyond_context=args.beyond_context)
    piece = model.tokenizer.piece
    predicted = [entry for entry in score.logprobs if entry is not None]
    reward = model.reward(text, args.prompt) if model.is_reward_model else None
    if args.prompt and reward is None:
        raise ConfigError(f"--prompt is for a reward model, and {model.label} is none: put it in front of the text")
    if args.json:
        tokens = [logprob_json(entry, model.tokenizer) for entry in predicted]
        totals = {"total_logprob": score.total, "perplexity": score.perplexity}
        if reward is not None:
            totals["reward"] = reward
        print_json({"model": model.label, "tokens": tokens, **totals})
        return 0
    if args.tokens or args.top:
        for entry in predicted:
            others = "".join(f"  {piece(i)!r} {p:.3f}" for i, p in entry.top)
            print(printable(f"{entry.logprob:9.4f}  {entry.id:>6}  {piece(entry.id)!r}{others}", args.raw))
    perplexity = "undefined" if score.perplexity is None else f"{score.perplexity:.4f}"
    print(f"perplexity {perplexity} over {count(len(predicted), 'token')}; log-probability {score.total:.4f} nats")
    if reward is not None:
        print(f"reward {reward:.4f}")
    return 0
