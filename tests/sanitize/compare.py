"""Compares what two builds of ``driver.c`` print; differences are relative to 1 or to the number.

Usage: compare.py TOLERANCE ONE OTHER
"""

from __future__ import annotations

import sys
from itertools import zip_longest


def main(tolerance: float, one: str, other: str) -> None:
    worst = (0.0, "no difference")
    differences = lines = 0
    model = ""
    with open(one) as first, open(other) as second:
        for a, b in zip_longest(first, second, fillvalue="nothing"):
            lines += 1
            if a.startswith("model"):
                model = a.strip()
            if a == b:
                continue
            differences += 1
            (name, x), (same, y) = a.split(), b.split()
            error = abs(float(x) - float(y)) / max(1.0, abs(float(x))) if name == same else 1e9
            worst = max(worst, (error, f"line {lines}: {a.strip()}, {b.strip()}; {model}"))
    print(f"{lines} lines, {differences} differ, by {worst[0]:.2g} at most ({worst[1]})")
    if worst[0] > tolerance or not lines:
        sys.exit(f"{one} and {other} differ by more than {tolerance}")


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
