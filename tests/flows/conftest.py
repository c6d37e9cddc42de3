"""What the flows share: models of test size, and a command line that is run in this process."""

import io
import sys

import pytest

from gemkit.cli import main
from support.tiny_models import write


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny models: "parrot" says the last token of its prompt over and over, the others have random weights.
    "chat" and "parrot-chat" were tuned for chat, "code" to fill in, "image" and "image-2" see images."""
    root = tmp_path_factory.mktemp("models")
    write(root / "parrot", parrot=True)
    write(root / "parrot-chat", parrot=True, chat=True)
    write(root / "random", "gemma-2-2b")
    write(root / "chat", "gemma-3-1b", chat=True)
    write(root / "code", code=True)
    write(root / "image", "paligemma-3b-mix-224")
    write(root / "image-2", "paligemma2-3b-mix-224")
    return root


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line; its exit code, stdout and stderr."""

    def run(*argv, stdin: bytes | None = None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as exit:  # argparse: a command line that cannot be read
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def error(run):
    """Run a command line that must fail with one line of ours; the line."""

    def error(*argv, **options):
        code, out, err = run(*argv, **options)
        assert (code, out) == (1, ""), f"exit {code}, stdout {out!r}, stderr {err!r}"
        *talk, line = err.splitlines()
        assert all(said.startswith("note: ") or " loaded in " in said for said in talk), err
        kind, colon, message = line.partition(": ")
        assert kind.endswith("Error"), line
        assert colon
        assert message
        return line

    return error
