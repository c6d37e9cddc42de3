"""`gemkit completion SHELL`: what a shell reads to complete verbs, options and names of members."""

from __future__ import annotations

import argparse
from typing import Any

from gemkit.cli.options import verb

_EXAMPLES = """\
  gemkit completion bash     (into ~/.local/share/bash-completion/completions/gemkit)
  gemkit completion zsh      (into a file _gemkit in a folder of $fpath)
  gemkit completion fish     (into ~/.config/fish/completions/gemkit.fish)"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "completion", "print what completes gemkit's commands in a shell", _EXAMPLES)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["gemkit"], shell=args.shell))
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks, by the environment, what could come next; the process ends."""
    import argcomplete

    argcomplete.autocomplete(parser)
