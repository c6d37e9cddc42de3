"""The scan of the recurrence beside the best Python loop over its steps, and its share of a whole recurrent block.

    python benchmarks/scan.py                       # 4,096 tokens of RecurrentGemma 2B's width, float32
    python benchmarks/scan.py --tokens 512 --rounds 3

Everything is asked in turn, round by round; medians, with the lowest and the highest round. Bytes are those that must
move: two arrays read and one written. The limit beside them is what an addition of two such arrays into a third, all
of them there before, moves in the same round. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import machine
import torch
from torch import Tensor

from gemkit import family, ops
from gemkit.nn import Batch
from gemkit.nn.griffin import Recurrent


def loop(a_TR: Tensor, b_TR: Tensor) -> Tensor:
    """One step after the other, each a single operation on rows that were cut beforehand, into the result itself."""
    h_TR = torch.empty_like(b_TR)
    a, b, h = a_TR.unbind(), b_TR.unbind(), h_TR.unbind()
    h[0].copy_(b[0])
    for t in range(1, len(h)):
        torch.addcmul(b[t], a[t], h[t - 1], out=h[t])
    return h_TR


def pieces(tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    config = family.get("recurrentgemma-2b").decoder
    layer = config.recurrent[0]
    torch.manual_seed(0)
    a, b, dh = torch.rand(tokens, layer.width), torch.randn(tokens, layer.width), torch.randn(tokens, layer.width)
    a = 1 - 0.3 * a**4  # most decays are near 1, as in a trained model
    into, recorded = torch.empty_like(b), [x.clone().requires_grad_(True) for x in (a, b)]
    torch.testing.assert_close(ops.linear_scan(a, b), loop(a, b), rtol=1e-4, atol=1e-4)

    def both_ways() -> None:
        for x in recorded:
            x.grad = None
        ops.linear_scan(*recorded).backward(dh)

    block = Recurrent(config, layer).requires_grad_(False)
    for p in block.parameters():
        torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
    batch = Batch.of([[0] * tokens])
    x_TD = torch.randn(tokens, config.width)
    u_TR = torch.randn(tokens, layer.width)
    gates = [gate(u_TR) for gate in (block.rg_lru.input_gate, block.rg_lru.recurrent_gate)]
    param = block.rg_lru.recurrent_param

    def alone(run: Callable[[], object]) -> Callable[[], object]:
        return torch.inference_mode()(run)

    return {
        "addition": alone(lambda: torch.add(a, b, out=into)),
        "loop": alone(lambda: loop(a, b)),
        "scan": alone(lambda: ops.linear_scan(a, b)),
        "scan, forward and backward": both_ways,
        "convolution": alone(lambda: block.conv_1d(u_TR, batch, None)),
        "recurrence": alone(lambda: ops.rg_lru(u_TR, *gates, param, batch)),
        "recurrent block": alone(lambda: block(x_TD, batch, None)),
    }


def measure(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round but the first, each of which begins with another piece."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for r in range(rounds + 1):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            work[name]()
            if r:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds = measure(pieces(args.tokens), args.rounds)
    width = family.get("recurrentgemma-2b").decoder.width
    nbytes = 3 * 4 * args.tokens * width
    limit = nbytes / median(seconds["addition"])

    def ratio(of: tuple[str, ...], to: str) -> float:
        """Median of the rounds' own ratios, so that a machine that slows down slows both."""
        return median(sum(parts) / whole for *parts, whole in zip(*(seconds[n] for n in of), seconds[to], strict=True))

    print(f"{args.tokens:,} tokens x {width:,} channels, float32, {args.threads} threads, {args.rounds} rounds")
    print(f"{'':28} {'median':>10} {'lowest':>10} {'highest':>10}")
    for name, values in seconds.items():
        print(f"{name:28} " + " ".join(f"{f(values) * 1e3:7.1f} ms" for f in (median, min, max)))
    reached = nbytes / median(seconds["scan"])
    results = {
        "loop_over_scan": ratio(("loop",), "scan"),
        "both_ways_over_scan": ratio(("scan, forward and backward",), "scan"),
        "share_of_block": ratio(("convolution", "recurrence"), "recurrent block"),
        "gigabytes_per_second": reached / 1e9,
        "share_of_memory_limit": reached / limit,
    }
    print(f"scan: {results['loop_over_scan']:.2f} times as fast as the loop")
    print(f"scan: {reached / 1e9:.1f} GB/s, {results['share_of_memory_limit']:.0%} of {limit / 1e9:.1f} GB/s")
    print(f"forward and backward: {results['both_ways_over_scan']:.2f} times the forward")
    print(f"convolution and recurrence: {results['share_of_block']:.1%} of the block")
    record = {"machine": machine.describe(args.threads), "commit": machine.commit(), "seconds": seconds, **results}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
