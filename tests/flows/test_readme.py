"""The examples of README.md, run as they stand. `# needs access` marks what no machine without an account can run."""

import re
import shlex
from pathlib import Path

import pytest

from gemkit import cli

README = (Path(__file__).parents[2] / "README.md").read_text()
GATED = "# needs access"


def blocks(*languages: str) -> list[str]:
    found = re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no block of {languages}"
    return found


COMMANDS = [line.strip().removeprefix("$ ") for block in blocks("sh", "console") for line in block.splitlines()]
COMMANDS = [line for line in COMMANDS if line.startswith("gemkit ")]


def test_python_examples(capsys):
    """One program, from top to bottom: later examples use the model of the first."""
    names, printed = {}, 0
    for block in blocks("python"):
        program = compile(block, "README.md", "exec")
        if GATED not in block:
            exec(program, names)
            out, _ = capsys.readouterr()
            assert out.strip(), block
            printed += 1
    assert printed


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_examples(command, capsys, monkeypatch):
    argv = shlex.split(command, comments=True)[1:]
    if GATED in command:  # it can at least be read
        monkeypatch.setattr(f"gemkit.cli.{argv[0].replace('-', '_')}.run", lambda args: print(args) or 0)
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.strip()
