"""`gemkit chat`: a conversation in a terminal."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING, Any

from gemkit.cli.options import add_model, add_output, add_sampling, load_model, options, verb
from gemkit.cli.output import conclude, print_json, result_json, say, write_stream
from gemkit.errors import GemkitError, TextError

if TYPE_CHECKING:
    from gemkit.conversation import Conversation
    from gemkit.gemma import Gemma

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
    add_output(parser, each=" a turn")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit.gemma import not_tuned_for_chat

    chosen = options(args)
    model = load_model(args)
    if "chat" not in model.prompts:
        say(f"note: {not_tuned_for_chat(model.label)}")

    def begin() -> Conversation:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said above, once, in plain words
            return model.conversation(args.system, **chosen)

    talk = begin()
    if args.message:
        return _turn(model, talk, " ".join(args.message), args)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # gives input() line editing and history

        say(_HELP)
    while True:
        try:
            words = input("> " if interactive and sys.stdout.isatty() else "").strip()
        except EOFError:
            return 0
        except UnicodeDecodeError as error:
            raise TextError(f"stdin is not UTF-8: it holds the byte 0x{error.object[error.start]:02x}") from None
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
        elif words and not interactive:
            if code := _turn(model, talk, words, args):
                return code
        elif words:
            try:
                _turn(model, talk, words, args)
            except GemkitError as error:  # costs the turn, not the conversation
                say(f"{type(error).__name__}: {error}")


def _turn(model: Gemma, talk: Conversation, words: str, args: argparse.Namespace) -> int:
    stream = talk.stream(words)
    if args.json:
        result = stream.finish()
        answer = result_json(result, model.tokenizer)
        print_json({"model": model.label, "message": words, **answer})
    else:
        result = write_stream(stream, args.raw)
    return conclude(args, model.tokenizer, result)
