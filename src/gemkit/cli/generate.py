"""`gemkit generate`: continue a text."""

from __future__ import annotations

import argparse
from typing import Any

from gemkit.cli.options import add_model, add_output, add_sampling, load_model, options, texts, verb
from gemkit.cli.output import conclude, print_json, result_json, say, write, write_stream
from gemkit.errors import ConfigError

_EXAMPLES = """\
  gemkit generate "The Gemma family is"
  gemkit generate -m gemma-2-2b --temperature 0.8 --top-p 0.95 "Once upon a time"
  gemkit generate --file story.txt --max-tokens 100 --stop "THE END"
  echo "Dear Ada," | gemkit generate
  gemkit generate --json "1 + 1 =" "2 + 2 ="        (several prompts run as one batch)"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "generate", "continue a text", _EXAMPLES)
    parser.add_argument("prompt", nargs="*", help="the text to continue, - for stdin; several run as one batch")
    parser.add_argument(
        "-f", "--file", action="append", default=[], metavar="PATH", help="read a prompt from a file, - for stdin"
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt in front of its continuation")
    parser.add_argument(
        "--control", action="store_true", help="text that spells a control token, like <start_of_turn>, is that token"
    )
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: log-probabilities and N alternatives")
    add_sampling(parser)
    add_model(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prompts = texts(args.prompt, args.file)
    if not prompts:
        raise ConfigError("there is no prompt: give a text, --file PATH, or pipe one in")
    if args.logprobs is not None and not args.json:
        raise ConfigError("--logprobs are printed with --json")
    chosen = options(args)
    model = load_model(args)
    if args.json or len(prompts) > 1:
        if args.logprobs is not None:
            chosen["logprobs"] = args.logprobs
        results = model.generate(prompts, control=args.control, **chosen)
        if args.json:
            pairs = zip(prompts, results, strict=True)
            answers = [{"prompt": prompt, **result_json(result, model.tokenizer)} for prompt, result in pairs]
            print_json({"model": model.label, "answers": answers})
        else:
            for prompt, result in zip(prompts, results, strict=True):
                say(f"── {prompt.strip().splitlines()[0][:70] if prompt.strip() else '(empty)'}")
                write((prompt if args.echo else "") + result.text + "\n", args.raw)
    else:
        stream = model.stream(prompts[0], control=args.control, **chosen)
        if args.echo:
            write(prompts[0], args.raw)
        results = [write_stream(stream, args.raw)]
    return conclude(args, model.tokenizer, *results)
