"""`gemkit bench long`: what depth costs a recurrent and an attentive model of the same size, measured.

Each model runs in a process of its own, so that its resident memory is its own, and the two take turns, so that a busy
minute of the machine falls on both. Weights are random and states are filled with random numbers: neither rate nor
memory depends on what the numbers are.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.cli.common import count, print_json, say, verb
from gemkit.errors import ConfigError

if TYPE_CHECKING:
    from gemkit import family
    from gemkit.inspect import Subject

_EXAMPLES = """\
  gemkit bench long                          RecurrentGemma 2B and Gemma 2B at a quarter of their widths
  gemkit bench long --scale full             at their published widths, one after the other (5.4 GB of memory)
  gemkit bench long -m recurrentgemma-9b     against the Gemma 1 of its size
  gemkit bench long --against gemma-3-1b --depths 1024,16384 --svg windows.svg
  gemkit bench long --decode-all --depths 4096,16384 --json"""

ROUNDS = 5
NOISE = 0.2  # a spread of rounds from which a figure is doubtful
SMALL = 4  # at --scale small every width is divided by this
DTYPE = "bfloat16"  # what all of the family is published in


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "bench", "measure decode rate and memory against depth, two models in turn", _EXAMPLES)
    parser.add_argument("what", choices=("long",), help="what to measure: long sequences")
    parser.add_argument(
        "-m", "--model", default="recurrentgemma-2b", metavar="MODEL", help="a member, folder or .gguf: its shape alone"
    )
    parser.add_argument("--against", metavar="MODEL", help="the other (default: the Gemma 1 nearest in size)")
    parser.add_argument(
        "--scale",
        choices=("small", "full"),
        default="small",
        help=f"small: widths and vocabulary divided by {SMALL}, layers, heads and windows as published; "
        "full: as published, one model in memory at a time (default: small)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers of each")
    parser.add_argument(
        "--depths", default="512,2048,8192,32768", metavar="LIST", help="tokens remembered (512,2048,8192,32768)"
    )
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help=f"to decode in each of {ROUNDS} rounds (8)")
    parser.add_argument("--decode-all", action="store_true", help="reach each depth by generating, not by filling")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: as torch chooses)")
    parser.add_argument(
        "--svg", default="bench-long.svg", metavar="FILE", help="where to draw the curves (bench-long.svg)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    plan = _plan(args)
    svg = Path(args.svg).expanduser()
    if svg.is_dir() or not os.access(svg.parent, os.W_OK):  # told before anyone waits for figures
        raise ConfigError(f"--svg {args.svg}: no file can be written there; name one in a folder of yours")
    for subject in plan.subjects:
        limit = subject.decoder.max_context
        if plan.depths[-1] > limit:
            say(
                f"note: {subject.label} was trained on {limit:,} tokens; going beyond is fine here, "
                "where only rate and memory are measured"
            )
    report = _measure(plan, quiet=args.json)
    svg.write_text(_drawing(report), encoding="utf-8")
    report["svg"] = str(svg)
    if args.json:
        print_json(report)
    else:
        _print_measured(report)
    say(f"drawn into {svg}")
    return 0


# ---------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Plan:
    """A command line that makes sense."""

    subjects: tuple[Subject, Subject]
    depths: list[int]
    scale: str
    tokens: int
    threads: int | None
    decode_all: bool


def _plan(args: argparse.Namespace) -> Plan:
    from gemkit.inspect import subject

    try:
        depths = sorted({int(depth) for depth in args.depths.split(",")})
    except ValueError:
        raise ConfigError(f"--depths {args.depths} must be whole numbers with commas between, as 512,8192") from None
    if depths[0] < 1:
        raise ConfigError(f"--depths {args.depths}: {depths[0]} must be at least 1")
    for option in ("tokens", "threads", "layers"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} must be at least 1")
    first = subject(args.model)
    second = subject(args.against or _same_size(first.decoder))
    if first.label == second.label:
        raise ConfigError(f"{first.label} against itself shows nothing: name another with --against")
    subjects = []
    for chosen in (first, second):
        decoder = chosen.decoder
        if args.layers is not None:
            if args.layers > len(decoder.layers):
                raise ConfigError(f"--layers {args.layers}: {chosen.label} has {len(decoder.layers)}")
            decoder = replace(decoder, layers=decoder.layers[: args.layers])
        subjects.append(replace(chosen, decoder=small(decoder) if args.scale == "small" else decoder))
    return Plan((subjects[0], subjects[1]), depths, args.scale, args.tokens, args.threads, args.decode_all)


def _same_size(decoder: family.DecoderConfig) -> str:
    """The Gemma 1 with the nearest number of parameters."""
    from gemkit import family
    from gemkit.inspect import cost

    size = cost.count(decoder).total
    plain = [member for member in family.members() if member.family == "Gemma 1" and member.tuning == "pretrained"]
    return min(plain, key=lambda member: abs(cost.count(member.decoder).total - size)).name


def small(decoder: family.DecoderConfig) -> family.DecoderConfig:
    """The decoder with every width divided by `SMALL`, so with about 1/16 of the parameters. The layers and their
    windows, the numbers of heads and the context stay.

    Raises:
        ConfigError: if the widths cannot be divided.
    """
    from gemkit import family

    def narrow(layer: family.Layer) -> family.Layer:
        mixer, divided = layer.mixer, "width" if isinstance(layer.mixer, family.Recurrent) else "head_dim"
        mixer = replace(mixer, **{divided: getattr(mixer, divided) // SMALL})
        return family.Layer(mixer, family.Mlp(layer.ffw.width // SMALL))

    try:
        return replace(
            decoder,
            vocab_size=decoder.vocab_size // SMALL,
            width=decoder.width // SMALL,
            layers=tuple(map(narrow, decoder.layers)),
        )
    except ConfigError as error:
        raise ConfigError(f"this shape cannot be divided by {SMALL} ({error}): use --scale full") from None


# ---------------------------------------------------------------- measuring


class Depths:
    """One model with random weights, whose one sequence grows from depth to depth."""

    def __init__(self, decoder: family.DecoderConfig, tokens: int, threads: int | None = None):
        import torch

        from gemkit import family
        from gemkit.executors.torch import TorchExecutor
        from gemkit.nn import Decoder

        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        with torch.device("meta"):
            module = Decoder(decoder)
        for name, shape in family.parameters(decoder):
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)
            module.hold(name, torch.nn.Parameter(weight, requires_grad=False))
        self.threads = torch.get_num_threads()
        self.executor = TorchExecutor(module)
        self.state = self.executor.new_state(1, room=tokens)
        self._tokens = tokens
        self._next = 0

    def machine(self) -> tuple[int, float]:
        """Threads, and bytes a second at which they read memory, which a decode step cannot exceed."""
        import torch

        numbers = torch.ones(2**26)  # 268 MB: more than any cache
        seconds = min(_seconds(numbers.sum) for _ in range(4))
        return self.threads, numbers.nbytes / seconds

    def fill(self, depth: int) -> None:
        """Remember random numbers up to `depth` tokens, row by row as decoding would, so that buffers grow alike."""
        import torch

        from gemkit import family

        config, start = self.state.decoder, self.state.lengths[0]
        with torch.inference_mode():
            # a few hundred rows again and again: random numbers for all would take longer than everything else
            numbers: dict[tuple[int, int], list[Any]] = {}
            for layer, entry in zip(config.layers, self.state.layers, strict=True):
                mixer = layer.mixer
                if isinstance(mixer, family.Recurrent):
                    entry.keep_tail(0, torch.randn(mixer.conv_width - 1, mixer.width, dtype=torch.bfloat16))
                    entry.keep_hidden(0, torch.randn(mixer.width))
                    continue
                heads = (mixer.kv_heads, mixer.head_dim)
                if heads not in numbers:
                    rows = torch.randn(256, 2, 1, *heads, dtype=torch.bfloat16)
                    numbers[heads] = [tuple(row) for row in rows]
                pairs = numbers[heads]
                for position in range(start, depth):
                    entry.append(0, position, *pairs[position % len(pairs)])
        self.state.advance([(0, depth - start, 0, start)])

    def decode(self, count: int) -> None:
        """Generate `count` tokens, each the likeliest."""
        from gemkit.generate import Chunk

        for _ in range(count):
            logits = self.executor.run([Chunk(0, [self._next])], self.state)
            self._next = int(logits[0].argmax())

    def deepen(self, depth: int, decode_all: bool) -> int:
        """Bring the sequence to `depth` tokens and warm up there; bytes that the state then holds."""
        if decode_all:
            self.decode(depth - self.state.lengths[0])
        elif depth > self.state.lengths[0]:
            self.fill(depth)
        held = self.state.nbytes
        self.round()  # the first after a filling is slow: buffers grow, pages come in
        return held

    def round(self) -> tuple[float, int | None]:
        """Seconds of decoding some tokens from here, which are then forgotten; resident bytes meanwhile."""
        mark = self.state.mark(0)
        seconds = _seconds(lambda: self.decode(self._tokens))
        memory = resident()
        self.state.rollback(mark)
        return seconds, memory


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident() -> int | None:
    """Bytes of memory that this process occupies; None where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Worker:
    """A `Depths` in a process of its own."""

    def __init__(self, label: str, pipe: Any, process: Any):
        self._label, self._pipe, self.process = label, pipe, process

    def ask(self, method: str, *args: Any) -> Any:
        """What `Depths.method(*args)` returns there.

        Raises:
            ConfigError: if the process has died.
        """
        try:
            self._pipe.send((method, args))
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ConfigError(
                f"the process that ran {self._label} has died, perhaps for want of memory: "
                "fewer --layers, smaller --depths or --scale small need less"
            ) from None


@contextmanager
def worker(label: str, *args: Any) -> Iterator[Worker]:
    """A worker whose process ends with the block; `args` are those of `Depths`."""
    from multiprocessing import get_context

    context = get_context("spawn")  # forking a process that runs torch's threads can hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()  # so that its end is noticed
    try:
        yield Worker(label, ours, process)
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Any, *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    depths = Depths(*args)
    while True:
        method, given = pipe.recv()
        pipe.send(getattr(depths, method)(*given))


def _measure(plan: Plan, quiet: bool) -> dict[str, Any]:
    """Everything that is reported, as data; on the way, the ceiling is printed."""
    from gemkit.inspect import compare, cost

    _check_memory(plan)
    report: dict[str, Any] = {
        "scale": plan.scale,
        "weights": "random",
        "dtype": DTYPE,
        "depths": plan.depths,
        "decode_all": plan.decode_all,
        "rounds": ROUNDS,
        "tokens": plan.tokens,
        "models": [
            {
                "model": subject.label,
                "parameters": cost.count(subject.decoder).total,
                "layers": len(subject.decoder.layers),
                "width": subject.decoder.width,
                "ffw_width": compare.shared(layer.ffw.width for layer in subject.decoder.layers),
                "vocab_size": subject.decoder.vocab_size,
                "max_context": subject.decoder.max_context,
                "weight_bytes": cost.weight_bytes(subject.decoder, dtype=DTYPE),
                "measured": [],
            }
            for subject in plan.subjects
        ],
    }
    pairs = list(zip(plan.subjects, report["models"], strict=True))
    for together in [pairs] if plan.scale == "small" else [[pair] for pair in pairs]:
        with ExitStack() as stack:
            workers = []
            for subject, record in together:
                say(f"{subject.label}: making random weights, {record['weight_bytes'] / 1e6:,.0f} MB")
                entered = stack.enter_context(worker(subject.label, subject.decoder, plan.tokens, plan.threads))
                workers.append(entered)
            if "threads" not in report:
                report["threads"], report["read_bytes_per_second"] = workers[0].ask("machine")
                if not quiet:
                    _print_ceiling(plan, report)
            for depth in plan.depths:
                way = "generating up to" if plan.decode_all else "filling states up to"
                say(f"{way} {depth:,} tokens, then {ROUNDS} rounds of {plan.tokens}")
                held = [one.ask("deepen", depth, plan.decode_all) for one in workers]
                rounds = [[one.ask("round") for one in workers] for _ in range(ROUNDS)]
                for (subject, record), bytes_held, of_one in zip(
                    together, held, zip(*rounds, strict=True), strict=True
                ):
                    record["measured"].append(_figures(subject.decoder, depth, plan.tokens, bytes_held, of_one))
    return report


def _figures(
    decoder: family.DecoderConfig, depth: int, tokens: int, held: int, rounds: Sequence[tuple[float, int | None]]
) -> dict[str, Any]:
    from gemkit.inspect import cost

    each = [seconds / tokens for seconds, _ in rounds]
    middle = sorted(each)[len(each) // 2]
    read = cost.decode_bytes(decoder, depth, DTYPE)
    return {
        "depth": depth,
        "tokens_per_second": 1 / middle,
        "ms_per_token": middle * 1e3,
        "spread": (max(each) - min(each)) / middle,
        "read_bytes": read,
        "read_bytes_per_second": read / middle,
        "state_bytes": held,
        "state_bytes_needed": cost.state_bytes(decoder, depth).total,
        "resident_bytes": rounds[-1][1],
        "rounds_ms_per_token": [seconds * 1e3 for seconds in each],
    }


def _check_memory(plan: Plan) -> None:
    """Refuse what cannot fit before the machine starts to swap."""
    from gemkit.inspect import cost, units
    from gemkit.weights.load import available_memory

    # while a buffer of keys grows, it is there as it was and half as large again
    needs = [
        cost.weight_bytes(s.decoder, dtype=DTYPE) + 5 * cost.state_bytes(s.decoder, plan.depths[-1]).total // 2
        for s in plan.subjects
    ]
    need, free = (sum if plan.scale == "small" else max)(needs), available_memory()
    if free is not None and need > free:
        raise ConfigError(
            f"weights and states take {units.memory(need)} and {units.memory(free)} of memory is free: "
            "fewer --layers, smaller --depths or --scale small need less"
        )


# ---------------------------------------------------------------- showing


def _print_ceiling(plan: Plan, report: dict[str, Any]) -> None:
    from gemkit.cli.tables import print_table
    from gemkit.inspect import cost, units
    from gemkit.inspect.compare import pattern

    for subject, record in zip(plan.subjects, report["models"], strict=True):
        print(f"{record['model']}: {_shape(record)}, {pattern(subject.decoder.layers)}")
    print(_what_was_run(report))
    speed = report["read_bytes_per_second"]
    print(
        f"\nThe ceiling: a token reads all weights and the state, and {report['threads']} threads here read "
        f"{units.memory(speed)}/s."
    )

    def cells(subject: Subject, depth: int) -> list[str]:
        weights, state = cost.weight_bytes(subject.decoder, dtype=DTYPE), cost.state_bytes(subject.decoder, depth).total
        return [
            "  " + subject.label,
            units.memory(weights),
            units.memory(state),
            units.memory(weights + state),
            f"{speed / (weights + state):.1f}",
        ]

    columns = [("", "left"), *((name, "right") for name in ("weights", "state", "read a token", "at most tok/s"))]
    print_table(columns, [(f"{depth:,} tokens", [cells(s, depth) for s in plan.subjects]) for depth in plan.depths])
    print(flush=True)


def _print_measured(report: dict[str, Any]) -> None:
    from gemkit.cli.tables import print_table
    from gemkit.inspect import units

    ceiling = report["read_bytes_per_second"]

    def cells(label: str, row: dict[str, Any]) -> list[str]:
        memory = row["resident_bytes"]
        return [
            "  " + label,
            f"{row['tokens_per_second']:.1f}",
            f"{row['ms_per_token']:.1f}",
            f"{row['spread']:.0%}" + ("!" if row["spread"] > NOISE else " "),
            f"{row['read_bytes_per_second'] / ceiling:.0%}",
            units.memory(row["state_bytes_needed"]),
            units.memory(row["state_bytes"]),
            "-" if memory is None else units.memory(memory),
        ]

    a, b = report["models"]
    groups = []
    for one, other in zip(a["measured"], b["measured"], strict=True):
        ratios = [one[key] / other[key] for key in ("tokens_per_second", "state_bytes_needed", "state_bytes")]
        rate, needed, held = (f"x {ratio:.3g}" for ratio in ratios)
        rows = [cells(a["model"], one), cells(b["model"], other), ["  ratio", rate, "", "", "", needed, held, ""]]
        groups.append((f"{one['depth']:,} tokens", rows))
    print(f"Measured, medians of {ROUNDS} rounds of {report['tokens']} tokens:")
    headings = ("tok/s", "ms a token", "spread", "of ceiling", "state", "held", "resident")
    print_table([("", "left"), *((heading, "right") for heading in headings)], groups)
    print("\nstate: what must be remembered; held: with the spare room of its buffers; resident: the whole process")
    if len(report["depths"]) > 1:
        print(_conclusion(report))
    if any(row["spread"] > NOISE for model in (a, b) for row in model["measured"]):
        say(f"note: rounds marked ! differ by more than {NOISE:.0%}: the machine had other work, measure again")


def _conclusion(report: dict[str, Any]) -> str:
    def sentence(model: dict[str, Any]) -> str:
        first, last = model["measured"][0], model["measured"][-1]
        kept = last["tokens_per_second"] / first["tokens_per_second"]
        grown = last["state_bytes_needed"] / first["state_bytes_needed"]
        return f"{model['model']} keeps {kept:.0%} of its rate and its state grows x {grown:.3g}"

    a, b = report["models"]
    return f"From {report['depths'][0]:,} to {report['depths'][-1]:,} tokens {sentence(a)}; {sentence(b)}."


def _shape(record: dict[str, Any]) -> str:
    from gemkit.inspect import compare, units

    ffw_width = compare.each(units.exact)(record["ffw_width"])
    return (
        f"{units.short(record['parameters'])} parameters, {count(record['layers'], 'layer')} "
        f"of width {record['width']:,}, feed-forward {ffw_width}, vocabulary {record['vocab_size']:,}"
    )


def _what_was_run(report: dict[str, Any]) -> str:
    scale = {"small": f"Widths are the published ones divided by {SMALL}", "full": "Widths are as published"}
    states = "states are generated token by token" if report["decode_all"] else "states are filled, not computed"
    return f"{scale[report['scale']]}; weights are random {report['dtype']}; {states}; {report['threads']} threads."


def _drawing(report: dict[str, Any]) -> str:
    from gemkit.inspect import units
    from gemkit.inspect.curves import Curve, Panel, draw

    def curves(key: str) -> list[Curve]:
        return [
            Curve(model["model"], [(row["depth"], row[key]) for row in model["measured"]]) for model in report["models"]
        ]

    shapes = [f"{record['model']}: {_shape(record)}." for record in report["models"]]
    return draw(
        [
            Panel("decode rate (tokens per second)", curves("tokens_per_second"), lambda rate: f"{rate:.3g}"),
            Panel("memory held by the state (bytes)", curves("state_bytes"), units.memory),
        ],
        title="Decode rate and memory against depth",
        x_label="depth (tokens remembered, logarithmic)",
        notes=[*shapes, _what_was_run(report)],
    )
