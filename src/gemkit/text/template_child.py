"""The process in which a chat template runs: Jinja in its immutable sandbox, with limits of time, memory and output.

Started by `sandbox.TemplateProcess`, as a file and not as a module: it imports nothing of ours. One line of JSON comes
in (the template's source, then lists of renderings), one goes out. A template that uses up its time is ended by the
kernel, whatever it computes: no loop, filter or constant that the compiler folds can hold it off.

Globals and filters are those that Transformers gives chat templates (utils/chat_template_utils.py), so that a template
means the same here.
"""

import encodings.unicode_escape  # noqa: F401  # as the next two: imported before the limits forbid to open files
import json
import os
import resource
import signal
import sys
from datetime import datetime

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 0.3  # of the processor, for one rendering: a long conversation takes a hundredth
MEMORY = 512 << 20  # bytes of address space, the interpreter's own included
OUTPUT = 16 << 20  # characters of one rendering; the longest context of the family is a twentieth
ERROR = 500  # characters of a message


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which says in a template what the assistant writes.

    Its text is put between the two marks of the rendering, if it asked for any.
    """

    tags = {"generation"}  # noqa: RUF012  # Jinja's own protocol
    marks = ("", "")

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_put_marks"), [], [], body).set_lineno(line)

    def _put_marks(self, caller):
        start, end = Generation.marks
        return start + caller() + end


class Dictionary:
    """The global `dict`: a function, so that no attribute of the type can be reached."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """The global `namespace`, without names that begin with an underscore."""

    def __init__(*args, **kwargs):  # a template may name an attribute "self"
        self, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name, value):
        Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the attribute {name!r} of a namespace begins with an underscore")


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(format):
    return datetime.now().strftime(format)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as it is: Jinja's own filter escapes what HTML must not hold."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return made


def render(template, request):
    """The texts of so many of the messages each; each has the time of one rendering."""
    Generation.marks = tuple(request["marks"])
    variables, texts = request["variables"], []
    for number, generation in request["asked"]:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        messages = variables["messages"][:number]
        given = {**variables, "messages": messages, "add_generation_prompt": generation}
        parts, length = [], 0
        for part in template.generate(**given):
            parts.append(part)
            length += len(part)
            if length > OUTPUT:
                raise jinja2.exceptions.TemplateError(f"its text is longer than {OUTPUT:,} characters")
        texts.append("".join(parts))
    return texts


def limit():
    """From here on: no file is opened, no process started, and memory and time have an end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to obey
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    for name, most in (("AS", MEMORY), ("CORE", 0), ("FSIZE", 0), ("NOFILE", 0), ("NPROC", 0)):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            try:
                resource.setrlimit(kind, (most, most))
            except (ValueError, OSError):  # a system that has no such limit
                continue


def main():
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    made, template = environment(), None
    limit()
    out.write(b'{"ready": true}\n')
    out.flush()
    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            request = json.loads(line)
            if template is None:
                template = made.from_string(request)
                answer = {"texts": []}
            else:
                answer = {"texts": render(template, request)}
            reply = json.dumps(answer).encode()
        except MemoryError:
            reply = json.dumps({"error": f"it needs more than {MEMORY >> 20} MiB"}).encode()
        except Exception as error:
            reply = json.dumps({"error": f"{error}"[:ERROR] or type(error).__name__, "line": _line(error)}).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(reply + b"\n")
        out.flush()


def _line(error):
    """The line of the template that an error comes from, if it is known."""
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return error.lineno
    found, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)
