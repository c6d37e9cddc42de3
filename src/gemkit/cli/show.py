"""`gemkit show MODEL`: what a model is and costs, and its modules."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from gemkit.cli.options import verb
from gemkit.cli.output import put, say

EXAMPLES = """\
  gemkit show gemma-7b                     what it is, what it costs, its modules
  gemkit show gemma-2-2b --dtype int4      weights in 4 bits
  gemkit show gemma-3-4b --context 32768   cache and arithmetic at 32,768 tokens
  gemkit show ./my-model.gguf              a checkpoint of your own
  gemkit show gemma-2-2b --program         the story of a token: every op, what it reads and computes
  gemkit show ./my-model.gguf --profile    the same, run here: how long each step takes
"""


def add(subparsers: Any) -> None:
    """Add the parser of `gemkit show`."""
    parser = verb(subparsers, "show", "print what a model is and what it costs", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a member of the family, a folder or a .gguf")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8", "int4"),
        default="bfloat16",
        help="how the weights are held (default: %(default)s)",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens in the context (default: as many as it was trained on)"
    )
    parser.add_argument("--full", action="store_true", help="layers in order, as PyTorch prints them")
    parser.add_argument("--program", action="store_true", help="every op that one token passes through")
    parser.add_argument("--profile", action="store_true", help="run it here, and print how long each step takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the model named by `args`."""
    if args.profile:
        return _profile(args)
    if args.program:
        return _program(args)
    from gemkit.inspect import subject
    from gemkit.inspect.tree import lines, tree

    shown = subject(args.model)
    context = shown.decoder.max_context if args.context is None else args.context
    if args.json:
        print(json.dumps(_record(shown, args.dtype, context)))
        return 0
    if context > shown.decoder.max_context:
        say(f"note: {shown.label} was trained on {shown.decoder.max_context:,} tokens; quality beyond is undefined")
    for line in _facts(shown, args.dtype, context):
        put(line)
    print()
    for line in _columns(lines(tree(shown.decoder, shown.vision), by_kind=not args.full)):
        put(line)
    return 0


def _program(args: argparse.Namespace) -> int:
    from gemkit.cli.tables import print_table
    from gemkit.errors import ConfigError
    from gemkit.inspect import profile, subject
    from gemkit.program.ir import Cost

    if args.dtype.startswith("int"):
        raise ConfigError(f"--dtype {args.dtype}: a program reads its weights as its files have them, or as floats")
    shown = subject(args.model)
    context = shown.decoder.max_context if args.context is None else args.context
    lines = profile.story(profile.traced(shown.decoder, _kinds_of(args.model), args.dtype), context)
    if args.json:
        records = [{**asdict(line), "cost": asdict(line.cost)} for line in lines]
        print(json.dumps({"model": shown.label, "context": context, "steps": records}))
        return 0
    total = sum((line.cost for line in lines), Cost())
    put(f"{shown.label}: one token at the end of {context:,} tokens, op by op\n")
    columns = [
        ("", "left"),
        ("op", "left"),
        ("reads", "left"),
        ("gives", "left"),
        ("bytes", "right"),
        ("FLOP", "right"),
    ]
    rows = [[line.result, line.op, line.reads, line.shape, *profile.sizes(line)] for line in lines]
    rows.append(["", "all", "", "", *profile.sizes(replace(lines[0], cost=total))])
    print_table(columns, [("", rows)])
    return 0


def _kinds_of(name: str) -> dict[str, tuple[str, int]]:
    """Kind and bytes of each weight of a checkpoint; empty for a member's name."""
    from pathlib import Path

    from gemkit.adapters.resolve import find
    from gemkit.weights import hub

    place, _ = hub.locate(name)
    if not isinstance(place, Path):
        return {}
    with find(place) as checkpoint:
        entries = checkpoint.reader.entries
        dense = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}
        return {
            part.param_name: (
                dense.get(entries[part.file_name].dtype, entries[part.file_name].dtype),
                entries[part.file_name].nbytes,
            )
            for part in checkpoint.parts
        }


def _profile(args: argparse.Namespace) -> int:
    """Run a prompt and some tokens, and print each step of the native executor with its time."""
    import numpy as np

    from gemkit.cli.tables import print_table
    from gemkit.errors import ModelError
    from gemkit.executors.native import library as native
    from gemkit.executors.native.lower import lower
    from gemkit.gemma import load
    from gemkit.generate import Chunk
    from gemkit.inspect import profile

    model = load(args.model, executor="native")
    runner = model.executor
    context = 512 if args.context is None else args.context
    if not 0 < context < model.config.max_context:
        raise ModelError(f"--context {context}: {model.label} was trained on {model.config.max_context:,} tokens")
    lowered = lower(profile.traced(model.config, {w.name: (w.kind, w.nbytes) for w in _weights(runner)}))
    limit = native.read_limit()
    ids = [3 + i % (model.config.vocab_size - 4) for i in range(context)]
    state, times = runner.new_state(1), {}
    for name, tokens, repeats in (("prompt", context, 1), ("token", 1, 16)):
        seconds = np.zeros(len(lowered.steps))
        for _ in range(repeats):
            runner.run([Chunk(0, ids[:tokens])], state, seconds=seconds)
        times[name] = profile.profile(lowered, seconds / repeats, tokens, 1, context)
    if args.json:
        record = {name: [asdict(step) for step in steps] for name, steps in times.items()}
        print(json.dumps({"model": model.label, "context": context, "read_limit": limit, **record}))
        return 0
    put(f"{model.label}: {runner.about()}; memory read at {limit / 1e9:.1f} GB/s")
    columns = [
        ("step", "left"),
        ("weights", "left"),
        ("ms", "right"),
        ("GB/s (of memory)", "right"),
        ("GFLOP/s", "right"),
    ]
    for name, steps in times.items():
        title = f"a prompt of {context} tokens" if name == "prompt" else f"one token after {context}"
        total = sum(step.seconds for step in steps)
        print(f"\n{title}: {1e3 * total:.2f} ms, step by step (together they are faster)\n")
        shown = steps if args.program else [*profile.by_op(steps)]
        print_table(columns, [("", [[step.op, step.what, *profile.rates(step, limit)] for step in shown])])
    return 0


def _weights(runner) -> list[Any]:
    """The weights of a packed model, as the program names them."""
    from gemkit.executors.native.packfile import KINDS
    from gemkit.program.ir import Weight

    kinds = [*KINDS, "float32"]  # plain arrays are of kind -1
    return [Weight(e.name, (e.rows, e.cols), kinds[e.kind], e.nbytes) for e in runner.pack.table]


def _facts(shown, dtype, context: int) -> list[str]:
    from gemkit.inspect import compare, cost, units

    decoder, vision, member = shown.decoder, shown.vision, shown.member
    count = cost.count(decoder, vision)
    state = cost.state_bytes(decoder, context)
    tokens = f"{units.exact(context)} tokens"
    others = [other for other in cost.BLOCK_BYTES if other != dtype]

    def weights(of) -> str:
        return f"{units.memory(cost.weight_bytes(decoder, vision, of))} in {of}"

    parts = [f"{units.exact(count.embedding)} embedding, tied to the head", units.exact(count.non_embedding)]
    if vision:
        parts.append(f"{units.exact(count.vision)} image tower and projection")
    facts = {
        "parameters": f"{units.exact(count.total)} ({' + '.join(parts)})",
        "weights": f"{weights(dtype)} ({', '.join(weights(other) for other in others)})",
        "layers": f"{len(decoder.layers)}: {compare.pattern(decoder.layers)}"
        + (f"; windows of {', '.join(map(units.exact, decoder.windows))}" if decoder.windows else ""),
        "width": f"{units.exact(decoder.width)}, MLP {compare.ffw_widths(decoder)}",
        "heads": f"{compare.heads(decoder)}; key/value heads {compare.sharing(decoder)}",
        "rope": compare.ropes(decoder),
        "vocabulary": units.exact(decoder.vocab_size),
        "context": f"{units.exact(decoder.max_context)} tokens in training",
        "cache": f"{units.kib(cost.cache_bytes_per_token(decoder).total)} a token; "
        f"{units.memory(state.total)} at {tokens}{_kinds(state)}",
        "one token": f"{units.flops(cost.decode_flops(decoder, context))}, "
        f"{units.memory(cost.decode_bytes(decoder, context, dtype))} read, at {tokens}",
    }
    for image in cost.images(decoder, vision) if vision else ():
        costs = (
            f"{image.tokens / decoder.max_context:.1%} of the context, "
            f"{units.memory(image.state_bytes)} of cache, {units.flops(image.flops)}"
        )
        if image.size == vision.tower.image_size:
            facts["one image"] = f"{units.exact(image.tokens)} tokens of {image.size} x {image.size} pixels, {costs}"
        else:
            facts[f"at {image.size} px"] = f"{units.exact(image.tokens)} tokens, {costs}; another model"
    if member:
        facts["answers to"] = ", ".join(member.prompts)
        facts["source"] = member.source
    title = f"{member.family}, {member.tuning}, {member.released}, {member.hub_id}" if member else "a local checkpoint"
    return [f"{shown.label}: {title}", "", *(f"  {label:<12}{text}" for label, text in facts.items())]


def _kinds(state) -> str:
    from gemkit.inspect import units

    parts = {"global": state.global_attention, "sliding": state.sliding_attention, "recurrent": state.recurrent}
    held = [f"{units.memory(n)} {kind}" for kind, n in parts.items() if n]
    return f" ({', '.join(held)})" if len(held) > 1 else ""


def _columns(lines) -> list[str]:
    """The tree on the left; on the right parameters and published names, as far as there is room for them."""
    from gemkit.cli.tables import width

    text = max(len(line.text) for line in lines)
    counts = ["parameters", *("" if line.count is None else f"{line.count:,}" for line in lines)]
    published = ["published as" if any(line.published for line in lines) else "", *(line.published for line in lines)]
    room = width() - text
    printed = []
    for line, count, name in zip(["", *(line.text for line in lines)], counts, published, strict=True):
        row = f"{line:<{text}}"
        if room >= 2 + max(map(len, counts)):
            row += f"  {count:>{max(map(len, counts))}}"
        if room >= 4 + max(map(len, counts)) + max(map(len, published)):
            row += f"  {name}"
        printed.append(row.rstrip())
    return printed if printed[0] else printed[1:]  # no headings where there is nothing under them


def _record(shown, dtype, context: int) -> dict[str, Any]:
    """Everything that is printed, as plain data in bytes and operations."""
    from gemkit.inspect import cost

    decoder, vision, member = shown.decoder, shown.vision, shown.member
    count = cost.count(decoder, vision)
    layers = [{"kind": layer.mixer.kind, **asdict(layer.mixer), "ffw": asdict(layer.ffw)} for layer in decoder.layers]
    costs: dict[str, Any] = {
        "dtype": dtype,
        "context": context,
        "parameters": {**asdict(count), "total": count.total},
        "weight_bytes": {of: cost.weight_bytes(decoder, vision, of) for of in cost.BLOCK_BYTES},
        "cache_bytes_per_token": asdict(cost.cache_bytes_per_token(decoder)),
        "state_bytes": asdict(cost.state_bytes(decoder, context)),
        "decode_flops": cost.decode_flops(decoder, context),
        "decode_bytes": cost.decode_bytes(decoder, context, dtype),
    }
    if vision:
        costs["image_tokens"] = vision.tokens
        costs["image_flops"] = cost.image_flops(decoder, vision)
        costs["images"] = [asdict(image) for image in cost.images(decoder, vision)]
    said = asdict(member) if member else {"name": shown.label}
    return {
        **said,
        "decoder": {**asdict(decoder), "layers": layers},
        "vision": asdict(vision) if vision else None,
        "cost": costs,
    }
