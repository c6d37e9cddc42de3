"""The process of a chat template: what it gives, and that a hostile one ends in an error within a second."""

import threading
import time

import pytest

from gemkit.errors import TextError
from gemkit.text.sandbox import TemplateProcess
from support.foreign_templates import CHATML, HOSTILE

ASK = [(1, True)]
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error_within_a_second(name):
    process = TemplateProcess(HOSTILE[name], "its template")
    began = time.process_time(), time.monotonic()
    with pytest.raises(TextError, match="its template refuses"):
        process.render(HELLO, ASK)
    assert time.process_time() - began[0] < 0.5  # nothing of it runs here
    assert time.monotonic() - began[1] < 5  # a second of an idle machine; tests share theirs


@pytest.mark.parametrize("source", ["{{ '{0.__class__}'.format(messages) }}", "{{ '' | attr('__class__') }}"])
def test_attributes_of_python_are_not_there(source):
    assert TemplateProcess(source, "t").render(HELLO, ASK) == [""]


def test_the_limit_is_time_of_the_processor_and_a_fraction_of_a_second():
    from gemkit.text import template_child

    assert template_child.SECONDS < 0.5
    assert template_child.MEMORY <= 1 << 30


def test_it_goes_on_after_an_error_and_in_any_thread():
    process = TemplateProcess("{{ raise_exception('no') if messages[0].content == 'bad' else '' }}" + CHATML, "t")
    with pytest.raises(TextError, match=r"t refuses these messages: no \(line 1\)"):
        process.render({"messages": [{"role": "user", "content": "bad"}]}, ASK)
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    got = []
    threads = [threading.Thread(target=lambda: got.extend(process.render(HELLO, ASK))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 4


def test_no_file_can_be_read_and_no_process_started():
    """By what is left of the interpreter if the sandbox itself had a hole: the limits of the process."""
    import subprocess
    import sys

    from gemkit.text import template_child

    code = (
        f"import runpy, os; m = runpy.run_path({template_child.__file__!r}); m['limit']()\n"
        "for act in (lambda: open('/etc/passwd'), lambda: open('/tmp/x', 'w')):\n"
        "    try: act(); print('opened')\n"
        "    except OSError: print('refused')\n"
        "try: bytearray(1 << 30); print('had')\n"
        "except MemoryError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 3
