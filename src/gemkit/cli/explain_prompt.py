"""`gemkit explain-prompt`: the text and the ids of what a model will really see."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gemkit.cli.options import add_model, texts, verb
from gemkit.cli.output import count, print_json, printable, put, say
from gemkit.errors import ConfigError

if TYPE_CHECKING:
    from gemkit.text import Prompt, Tokenizer

_EXAMPLES = """\
  gemkit explain-prompt "Hello world!"
  gemkit explain-prompt --chat -m gemma-2-2b-it "Why is the sky blue?"
  gemkit explain-prompt --chat --system "Be brief." "Hello" "Hi, how can I help?" "Tell me a joke."
  gemkit explain-prompt --infill -m codegemma-2b --prefix 'import ' --suffix $'\\nsys.exit(0)'
  gemkit explain-prompt --image -m paligemma-3b-mix-224 "answer en where is the cat?\""""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "explain-prompt", "show the text and the ids that a model will really see", _EXAMPLES)
    parser.add_argument("text", nargs="*", help="the prompt, - for stdin; with --chat the turns, the user's first")
    parser.add_argument("-f", "--file", metavar="PATH", help="read the prompt from a file, - for stdin")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="as a conversation")
    kind.add_argument("--infill", action="store_true", help="as infilling, with --prefix and --suffix")
    kind.add_argument("--image", action="store_true", help="as a task on one image")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: instructions")
    parser.add_argument("--prefix", metavar="TEXT", help="with --infill: the text before the caret")
    parser.add_argument("--suffix", metavar="TEXT", help="with --infill: the text after the caret")
    parser.add_argument("--path", metavar="PATH", help="with --infill: the path of the file")
    parser.add_argument("--control", action="store_true", help="text that spells a control token is that token")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--raw", action="store_true", help="on a terminal, do not escape control characters")
    add_model(parser, runs=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit.adapters.resolve import vocabulary_of

    _refuse_without_effect(args)
    words = [*args.text] if args.infill else texts(args.text, [args.file] if args.file else [])
    label, tokenizer, prompts = vocabulary_of(args.model)
    prompt = _prompt(args, words, tokenizer)
    if prompt.format not in prompts:
        say(f"note: {label} was trained to {', '.join(prompts)}, not to {prompt.format}")
    if args.json:
        spans = [
            {
                "kind": span.kind,
                "role": span.role,
                "text": span.text,
                "tokens": [
                    {"id": i, "piece": tokenizer.piece(i), "control": tokenizer.is_control(i)} for i in span.ids
                ],
            }
            for span in prompt.spans
        ]
        report = {
            "model": label,
            "format": prompt.format,
            "text": prompt.text,
            "ids": prompt.ids,
            "spans": spans,
            "stop_ids": sorted(prompt.stop_ids),
            "notes": list(prompt.notes),
        }
        print_json(report)
        return 0
    put(f"{prompt.format} prompt for {label}: {count(len(prompt), 'token')}")
    for span in prompt.spans:
        if span.is_run:  # an image is hundreds of one token
            print(f"\n{span.kind}: {span}")
            continue
        print(printable(f"\n{span.kind}{f' ({span.role})' if span.role else ''}: {span.text!r}", args.raw))
        for token in span.ids:
            mark = "  control" if tokenizer.is_control(token) else ""
            print(printable(f"{token:>8}  {tokenizer.piece(token)!r}{mark}", args.raw))
    stops = ", ".join(f"{tokenizer.piece(i)} ({i})" for i in sorted(prompt.stop_ids))
    print(f"\nthe answer ends at {stops}")
    for note in prompt.notes:
        say(f"note: {note}")
    return 0


def _refuse_without_effect(args: argparse.Namespace) -> None:
    """Raise ConfigError for an option of another kind of prompt: none is dropped in silence."""
    belongs = {"system": args.chat, "prefix": args.infill, "suffix": args.infill, "path": args.infill}
    for name, with_effect in belongs.items():
        if getattr(args, name) is not None and not with_effect:
            raise ConfigError(f"--{name} belongs to {'--chat' if name == 'system' else '--infill'}")
    if args.control and (args.chat or args.infill or args.image):
        raise ConfigError("--control is for plain prompts: in a conversation, an infilling or a task, text is text")


def _prompt(args: argparse.Namespace, words: list[str], tokenizer: Tokenizer) -> Prompt:
    from gemkit import text  # imports NumPy, which the help of other verbs need not wait for

    if args.infill:
        if words or args.file:
            raise ConfigError("--infill takes --prefix and --suffix instead of a prompt")
        return text.infill(tokenizer, args.prefix or "", args.suffix or "", path=args.path)
    if not words:
        raise ConfigError("there is no prompt: give a text, or --file PATH")
    if args.chat:
        messages = [{"role": "system", "content": args.system}] if args.system else []
        messages += [{"role": "user" if i % 2 == 0 else "assistant", "content": w} for i, w in enumerate(words)]
        return text.chat(tokenizer, messages)
    if args.image:
        from gemkit.image_tasks import no_image_tower
        from gemkit.inspect import subject

        vision = None if args.model is None else subject(args.model).vision
        if vision is None:
            raise no_image_tower(args.model or "the starter model")
        return text.image(tokenizer, " ".join(words), patches=vision.tokens)
    if len(words) > 1:
        raise ConfigError(f"{len(words)} texts: one prompt, or the turns of a conversation with --chat")
    return text.complete(tokenizer, words[0], control=args.control)
