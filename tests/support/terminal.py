"""A command on a terminal of its own, as a user types at it."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

GEMKIT = [sys.executable, "-m", "gemkit.cli"]


def heed_ctrl_c() -> None:
    """In a child: a shell that starts the tests in the background lets it inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *argv):
        self._master, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO  # what comes back is then what the command wrote
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        environment = {**os.environ, "TERM": "dumb"}
        self._process = subprocess.Popen(
            [*GEMKIT, *argv], stdin=slave, stdout=slave, stderr=slave, env=environment, preexec_fn=heed_ctrl_c
        )
        os.close(slave)
        self._seen = b""

    def until(self, text: str) -> str:
        """What it writes up to `text`."""
        deadline = time.monotonic() + 60
        while text.encode() not in self._seen:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self._seen!r}"
            self._seen += os.read(self._master, 65536)
        before, self._seen = self._seen.split(text.encode(), 1)
        return before.decode()

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def interrupt(self) -> None:
        """What the terminal does on Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        return self._process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._master)
