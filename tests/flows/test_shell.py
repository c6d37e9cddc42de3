"""The habits of a shell: pipes, closed streams, accounts without a home, text files of all editors, slash commands."""

import json
import os
import subprocess
import sys

import pytest

from gemkit.cli import infill
from gemkit.errors import ConfigError
from support.terminal import GEMKIT, Terminal

# ── pipes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("line_end", [b"", b"\n", b"\r\n"])
def test_a_prompt_from_a_pipe(run, models, line_end):
    for argv in ([], ["-"]):
        code, out, _ = run("generate", "-m", models / "parrot", "-n", 2, "-q", *argv, stdin=b"ab" + line_end)
        assert (code, out) == (0, "bb\n")


def test_a_pipe_is_one_prompt_among_others(run, models):
    _, out, _ = run("generate", "-m", models / "parrot", "-n", 2, "-q", "a", "-", stdin=b"b\n")
    assert out == "aa\nbb\n"


def test_other_verbs_read_a_pipe(run, models, tmp_path):
    _, out, _ = run("score", "-m", models / "parrot", "--json", stdin=b"ab\n")
    assert [token["piece"] for token in json.loads(out)["tokens"]] == ["a", "b"]
    _, out, _ = run("explain-prompt", "-m", models / "chat", "--json", "-", stdin=b"hi\n")
    assert json.loads(out)["text"] == "<bos>hi"
    argv = ["infill", "-m", models / "code", "-n", 2, "-", "--at", "2:1", "--json"]
    assert json.loads(run(*argv, stdin=b"a\nb\n")[1])["prefix"] == "a\n"


def test_nothing_in_a_pipe_is_no_prompt(error):
    assert "there is no prompt" in error("generate", stdin=b"")
    assert "there is no text" in error("score", stdin=b"")


# ── text files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_end_as_in_editors():
    text = "import os\n\f\ndef alpha():\r\n    return '\u2028\x85\x1c'\rdef beta():\n    return alpha(\n"

    def before(at):
        return text[: infill._offset(text, at, "mod.py")]

    assert before("6:18") == text[:-1]
    assert before("2:2") == "import os\n\f"
    assert before("4:16").endswith("\u2028\x85\x1c")
    assert before("5:1").endswith("\r")
    assert before("7:1") == text
    for at in ("8:1", "0:1", "3:14", "6:19"):
        with pytest.raises(ConfigError, match=r"mod\.py"):
            before(at)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_other_editors(run, models, tmp_path, encoding):
    file = tmp_path / "prompt.txt"
    file.write_bytes("x\r\ny".encode(encoding))
    _, out, _ = run("generate", "-m", models / "parrot", "-n", 2, "-q", "--echo", "--file", file)
    assert out == "x\r\nyyy\n"
    argv = ["infill", "-m", models / "code", "-n", 2, file, "--at", "2:1", "--json"]
    assert json.loads(run(*argv)[1])["prefix"] == "x\r\n"


# ── streams that are closed ─────────────────────────────────────────────────────────────────────────────────────────


def closed(models, number, *argv, **options):
    """A command whose stream of this number is closed, as `>&-` does."""
    command = [*GEMKIT, *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, preexec_fn=lambda: os.close(number), timeout=100, text=True, **options
    )


def test_stdout_closed_is_one_line(models):
    done = closed(models, 1, "generate", "-m", models / "parrot", "-q", "-n", 2, "ab")
    assert done.returncode == 1
    assert (
        done.stderr == "ConfigError: stdout is closed: there is no place for the answer; give it one, as with > FILE\n"
    )


def test_stderr_or_stdin_closed_gives_the_answer(models):
    argv = ("generate", "-m", models / "parrot", "-n", 2, "ab")
    assert (closed(models, 2, *argv).stdout, closed(models, 0, *argv).stdout) == ("bb\n", "bb\n")
    assert closed(models, 0, "generate", "-m", models / "parrot").returncode == 1


def test_talk_that_nobody_reads_costs_no_answer(models):
    reading, writing = os.pipe()
    os.close(reading)
    argv = [*GEMKIT, "generate", "-m", str(models / "parrot"), "-n", "2", "ab"]
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=pipe, timeout=100)
    assert (done.returncode, done.stdout) == (0, b"bb\n")


# ── no home ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NOBODY = """
import os, pwd, sys
os.environ.pop("HOME", None)
def unknown(*_):
    raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = unknown  # as in a container whose user has no entry
from gemkit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def nobody(*argv, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("GEMKIT_CACHE", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", NOBODY, *map(str, argv)]
    return subprocess.run(command, capture_output=True, env={**kept, **variables}, text=True, timeout=100)


def test_a_starter_without_a_home_says_what_to_set():
    done = nobody("generate", "-n", 2, "hi")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "GEMKIT_CACHE or XDG_CACHE_HOME" in line


def test_doctor_runs_without_a_home():
    done = nobody("doctor", "-m", "gemma-2b")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_runs_without_a_home(models):
    done = nobody("generate", "-m", models / "parrot", "-n", 2, "ab")
    assert (done.returncode, done.stdout) == (0, "bb\n")
    assert "Traceback" not in done.stderr


# ── what a slash begins ─────────────────────────────────────────────────────────────────────────────────────────────


def turns(run, models, *lines, model="chat"):
    argv = ["chat", "-m", models / model, "-n", 4, "-t", 0, "--json"]
    code, out, err = run(*argv, stdin="\n".join(lines).encode())
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()], err


def test_a_turn_is_forgotten_and_answered_again(run, models):
    plain, _ = turns(run, models, "Hello", "And you?")
    (first, wrong, second), err = turns(run, models, "Hello", "Wrong", "/undo", "And you?")
    assert wrong["message"] == "Wrong"
    assert [first["ids"], second["ids"]] == [turn["ids"] for turn in plain]
    assert "the last turn is forgotten" in err
    again, _ = turns(run, models, "Hello", "And you?", "/retry", "/undo", "/retry", "/undo", "/undo", "Hello")
    assert [turn["message"] for turn in again] == ["Hello", "And you?", "And you?", "Hello", "Hello"]
    assert again[2]["ids"] == again[1]["ids"] == plain[1]["ids"]
    assert again[3]["ids"] == again[4]["ids"] == plain[0]["ids"]
    # the state from before the turn is there again: nothing but the turn is computed
    assert again[2]["timings"]["cached_tokens"] == again[1]["timings"]["cached_tokens"]


def test_a_conversation_is_kept_and_taken_up(run, models, tmp_path):
    plain, _ = turns(run, models, "Hello", "And you?")
    turns(run, models, "Hello", f"/save {tmp_path / 'kept'}")
    (second,), err = turns(run, models, f"/load {tmp_path / 'kept'}", "And you?")
    assert second["ids"] == plain[1]["ids"]
    assert "tokens so far" in err


def test_settings_and_instructions_change(run, models):
    told, err = turns(
        run, models, "/set max-tokens 2", "Hello", "/set max-tokens", "/clear", "Hello", "/system Be kind.", "Hello"
    )
    assert [len(turn["ids"]) for turn in told] == [2, 4, 4]
    assert told[2]["timings"]["prompt_tokens"] > told[1]["timings"]["prompt_tokens"]
    argv = ["chat", "-m", models / "chat", "-n", 4, "-t", 0, "--json", "--system", "Be kind.", "Hello"]
    assert json.loads(run(*argv)[1])["ids"] == told[2]["ids"]
    assert "with these instructions" in err


def test_two_slashes_are_one(run, models):
    (turn,), _ = turns(run, models, "//etc/passwd")
    assert turn["message"] == "/etc/passwd"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sytem x", "there is no /sytem; did you mean system"),
        ("/set warmth 1", "there is no such setting"),
        ("/set temperature warm", "that is no number"),
        ("/set temperature -1", "temperature"),
        ("/set max-tokens 0", "must be at least 1"),
        ("/save", "where to"),
        ("/load", "which conversation"),
        ("/load nowhere", "cannot be read"),
        ("/image cat.png", "sees no images in a conversation"),
    ],
)
def test_a_command_that_cannot_be(error, models, line, message):
    assert message in error("chat", "-m", models / "chat", stdin=line.encode())


def test_a_wrong_command_costs_nothing_on_a_terminal(models):
    with Terminal("chat", "-m", models / "parrot-chat", "-t", "0", "-n", "2") as terminal:
        terminal.until("> ")
        terminal.type("/hlep\n")
        assert "there is no /hlep; did you mean help" in terminal.until("> ")
        terminal.type("/help\n")
        assert "/retry" in terminal.until("> ")
        terminal.type("/quit\n")
        assert terminal.exit_code() == 0
