"""How quantities are written: three digits that matter, and a unit."""

from __future__ import annotations


def exact(n: int) -> str:
    """A whole number with its thousands apart: 2,506,172,416."""
    return f"{n:,}"


def short(n: float) -> str:
    """Three digits and a decimal prefix: 2.51B, 268M, 640."""
    return _prefixed(n, ("", "K", "M", "B", "T"))


def memory(n: float) -> str:
    """Bytes in decimal units: 5.01 GB."""
    return _prefixed(n, (" B", " kB", " MB", " GB", " TB"))


def flops(n: float) -> str:
    """Floating-point operations: 5.01 GFLOP."""
    return _prefixed(n, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def kib(n: int) -> str:
    """Bytes a token in binary units, in which a cache comes out round: 18 KiB."""
    return f"{n / 1024:,.4g} KiB" if n < 1024 * 10_000 else memory(n)


def _prefixed(n: float, prefixes: tuple[str, ...]) -> str:
    sign, n = ("-", -n) if n < 0 else ("", n)
    power = 0
    # 999.5 would round up to four digits, so it takes the next prefix
    while n >= 999.5 and power < len(prefixes) - 1:
        n, power = n / 1000, power + 1
    digits = 0 if n >= 99.95 or (n == int(n) and power == 0) else 1 if n >= 9.995 else 2
    return f"{sign}{n:.{digits}f}{prefixes[power]}"


def factor(value: float) -> str:
    """A ratio in three digits, or whole and with commas where it has more: 0.934, 24.9, 4,560."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
