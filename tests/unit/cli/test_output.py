"""What verbs write to a terminal and into a file."""

import io

import pytest

from gemkit.cli import output


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    return now


def load(clock, seconds: float, enabled: bool = True) -> None:
    with output.Progress(enabled) as progress:
        for done in range(5):
            progress(done * 250_000_000, 1_000_000_000)
            clock[0] += seconds


@pytest.mark.parametrize(
    ("terminal", "seconds", "enabled", "shows"),
    [
        (Terminal, 0.6, True, True),
        (Terminal, 0.1, True, False),  # over within a second
        (Terminal, 0.6, False, False),  # --quiet
        (io.StringIO, 0.6, True, False),  # a file
    ],
)
def test_loading_is_shown_where_it_takes_a_while(clock, monkeypatch, terminal, seconds, enabled, shows):
    stderr = terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    load(clock, seconds, enabled)
    assert ("loading" in stderr.getvalue()) == shows
    assert ("GB" in stderr.getvalue()) == shows
    assert shows or stderr.getvalue() == ""


def test_the_bar_leaves_stdout_to_the_results(clock, monkeypatch):
    stdout = io.StringIO()
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr("sys.stdout", stdout)
    with output.Progress(True) as progress:
        clock[0] += 2
        progress(1, 2)
        print("a result")
    assert stdout.getvalue() == "a result\n"


def test_control_characters_of_a_model_are_shown_not_obeyed(monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    assert output.printable("a\x1b[2Jb\n\tü") == "a\\x1b[2Jb\n\tü"
    assert output.printable("a\x1b[2J", raw=True) == "a\x1b[2J"
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert output.printable("a\x1b[2J") == "a\x1b[2J"
