"""`gemkit chat`: a conversation in a terminal."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

from gemkit.cli.common import (
    add_model,
    add_output,
    add_sampling,
    figures,
    load_model,
    options,
    result_json,
    say,
    verb,
    write_stream,
)

if TYPE_CHECKING:
    from gemkit.gemma import Conversation

_EXAMPLES = """\
  gemkit chat -m gemma-2-2b-it
  gemkit chat -m gemma-3-1b-it --system "Answer in one sentence." "Why is the sky blue?"
  printf 'Hello!\\nAnd in French?\\n' | gemkit chat -m gemma-2-2b-it --json"""

_HELP = "/reset starts anew, /help shows this, /exit or Ctrl-D leaves; Ctrl-C stops an answer and keeps it"


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "chat", "talk with a model, turn by turn", _EXAMPLES)
    parser.add_argument("message", nargs="*", help="what to say; without it, turns are read from the terminal or stdin")
    parser.add_argument("--system", metavar="TEXT", help="instructions, put at the head of the first turn")
    add_sampling(parser, max_tokens=1024)
    add_model(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit.gemma import not_tuned_for_chat

    chosen = options(args)
    model = load_model(args)
    if "chat" not in model.prompts:
        say(f"note: {not_tuned_for_chat(model.label)}")
    warnings.simplefilter("ignore", UserWarning)  # said above, once, in plain words

    def begin() -> Conversation:
        return model.conversation(args.system, **chosen)

    talk = begin()
    if args.message:
        return _turn(talk, " ".join(args.message), args)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # gives input() line editing and history

        say(_HELP)
    while True:
        try:
            words = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:  # at the prompt: clears the line, as in a shell
            say("")
            continue
        if words in ("/exit", "/quit"):
            return 0
        if words == "/reset":
            talk = begin()
            say("a new conversation")
        elif words == "/help":
            say(_HELP)
        elif words:
            _turn(talk, words, args)


def _turn(talk: Conversation, words: str, args: argparse.Namespace) -> int:
    stream = talk.stream(words)
    if args.json:
        result = stream.finish()
        print(json.dumps({"message": words, **result_json(result)}, ensure_ascii=False), flush=True)
    else:
        result = write_stream(stream, args.raw)
    if not args.quiet:
        say(figures(result))
    return 130 if result.finish_reason == "interrupted" else 0
