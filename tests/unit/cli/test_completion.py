"""What a shell is told when it completes a command."""

import os
import subprocess

import pytest

from support.terminal import GEMKIT


def completed(line: str, tmp_path) -> list[str]:
    """Asked as argcomplete's function of bash asks."""
    answers = tmp_path / "answers"
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answers),
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
    }  # fmt: skip
    subprocess.run(GEMKIT, env=environment, capture_output=True, timeout=60, check=False)
    return [word.strip() for word in answers.read_text().split("\n")]


def test_verbs_options_and_members(tmp_path):
    assert completed("gemkit gen", tmp_path) == ["generate"]
    assert "--max-tokens" in completed("gemkit generate --max", tmp_path)
    assert "gemma-3-270m-it" in completed("gemkit chat -m gemma-3-", tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_own(shell):
    done = subprocess.run([*GEMKIT, "completion", shell], capture_output=True, text=True, timeout=60, check=True)
    assert "gemkit" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
