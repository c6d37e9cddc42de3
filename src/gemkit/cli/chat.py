"""`gemkit chat`: a conversation in a terminal."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemkit.cli.options import add_model, add_output, add_sampling, load_model, options, verb
from gemkit.cli.output import conclude, print_json, result_json, say, write_stream
from gemkit.errors import ConfigError, GemkitError, ModelError, TextError, nearest

if TYPE_CHECKING:
    from gemkit.gemma import Gemma

_EXAMPLES = """\
  gemkit chat -m gemma-2-2b-it
  gemkit chat -m gemma-3-1b-it --system "Answer in one sentence." "Why is the sky blue?"
  printf 'Hello!\\nAnd in French?\\n' | gemkit chat -m gemma-2-2b-it --json"""

_HELP = """\
/system TEXT      other instructions, and a new conversation
/undo, /retry     forget the last turn; or answer it again
/clear, /reset    a new conversation
/save FOLDER      keep the conversation; /load FOLDER goes on with it
/set NAME VALUE   temperature, top-k, top-p, min-p, repetition-penalty, seed or max-tokens; /set NAME as at the start
/quit, /exit      leave, as Ctrl-D does; Ctrl-C stops an answer and keeps it
//...             a message that begins with a slash"""
_SETTINGS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
}


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
    session = Session(model, args, chosen)
    if args.message:
        return session.turn(" ".join(args.message))
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # gives input() line editing and history

        say("/help shows what can be said besides messages; /reset starts anew, Ctrl-D leaves, Ctrl-C stops an answer")
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
        words = words.removeprefix("\ufeff")  # that some editors put before a text
        if words in ("/exit", "/quit"):
            return 0
        if not words:
            continue
        try:
            code = session.read(words)
        except GemkitError as error:  # costs the turn, not the conversation
            if not interactive:
                raise
            say(f"{type(error).__name__}: {error}")
        else:
            if code and not interactive:
                return code


class Session:
    """A conversation, and what a slash in front of a line does with it."""

    def __init__(self, model: Gemma, args: argparse.Namespace, chosen: Any):
        self._model, self._args, self._chosen = model, args, chosen
        self._system = args.system
        self._begin()

    def _begin(self) -> None:
        self._said: list[str] = []  # what the user said in each turn that can be undone
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said at the start, once, in plain words
            self._talk = self._model.conversation(self._system, **self._chosen)

    def read(self, line: str) -> int:
        """A message, or a command; the exit code.

        Raises:
            ConfigError: for a command that there is not.
        """
        if not line.startswith("/") or line.startswith("//"):
            return self.turn(line.removeprefix("/") if line.startswith("//") else line)
        name, _, rest = line[1:].partition(" ")
        if name not in _COMMANDS:
            known = nearest(name, _COMMANDS, otherwise="/help shows them")
            raise ConfigError(f"there is no /{name}; {known} (a message that begins with a slash begins with two)")
        return _COMMANDS[name](self, rest.strip()) or 0

    def turn(self, words: str) -> int:
        """The user's next turn, and the answer to it."""
        stream = self._talk.stream(words)
        if self._args.json:
            result = stream.finish()
            answer = result_json(result, self._model.tokenizer)
            print_json({"model": self._model.label, "message": words, **answer})
        else:
            result = write_stream(stream, self._args.raw)
        self._said.append(words)
        return conclude(self._args, self._model.tokenizer, result)

    def help(self, _: str) -> None:
        say(_HELP)

    def clear(self, _: str) -> None:
        self._begin()
        say("a new conversation")

    def system(self, text: str) -> None:
        self._system = text or None
        self._begin()
        say("a new conversation, with these instructions" if text else "a new conversation, without instructions")

    def undo(self, _: str) -> None:
        if self._said and self._talk.undo():
            self._said.pop()
            say("the last turn is forgotten")
        else:
            say("there is no turn to forget")

    def retry(self, _: str) -> int:
        if self._said and self._talk.undo():
            return self.turn(self._said.pop())
        say("there is no turn to answer again")
        return 0

    def save(self, folder: str) -> None:
        if not folder:
            raise ConfigError("/save FOLDER: where to?")
        say(f"kept in {self._talk.save(folder)}")

    def load(self, folder: str) -> None:
        if not folder:
            raise ConfigError("/load FOLDER: which conversation?")
        self._talk, self._said = self._model.load_conversation(folder), []
        say(f"going on with {folder}: {len(self._talk.ids):,} tokens so far")

    def image(self, _: str) -> None:
        raise ModelError(
            f"{self._model.label} sees no images in a conversation; a PaliGemma answers `gemkit ask IMAGE QUESTION`"
        )

    def set(self, assignment: str) -> None:
        name, _, value = assignment.replace("=", " ", 1).partition(" ")
        key, value = name.replace("-", "_"), value.strip()
        settings: dict[str, Any] = self._talk.options  # type: ignore[assignment]  # by computed names
        if not assignment:
            said = {key: settings[key] for key in _SETTINGS if key in settings}
            say(", ".join(f"{key.replace('_', '-')} {value}" for key, value in said.items()) + "; else as published")
            return
        if key not in _SETTINGS:
            raise ConfigError(f"/set {name}: there is no such setting; they are {', '.join(_SETTINGS)}")
        changed = {**settings}
        changed.pop(key, None)
        if value:
            try:
                changed[key] = _SETTINGS[key](value)
            except ValueError:
                raise ConfigError(f"/set {name} {value}: that is no number") from None
        elif key in self._chosen:
            changed[key] = self._chosen[key]
        _check(changed)
        settings.clear()
        settings.update(changed)
        say(f"{name} {changed.get(key, 'as published')}")


def _check(settings: dict[str, Any]) -> None:
    """Raises: ConfigError, for a value out of its range."""
    from gemkit.generate import Sampling

    Sampling(**{key: value for key, value in settings.items() if key in _SETTINGS and key != "max_tokens"})
    if settings.get("max_tokens", 1) < 1:
        raise ConfigError(f"max-tokens {settings['max_tokens']} must be at least 1")


_COMMANDS: dict[str, Callable[[Session, str], int | None]] = {
    "help": Session.help,
    "clear": Session.clear,
    "reset": Session.clear,
    "system": Session.system,
    "undo": Session.undo,
    "retry": Session.retry,
    "save": Session.save,
    "load": Session.load,
    "image": Session.image,
    "set": Session.set,
}
