"""What `import recog_fast` costs beyond torch and NumPy: `python -m benchmarks.imports [--rounds 5]`.

`-X importtime` of fresh interpreters; of the rounds the one with the least sum counts, since other work only adds.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

BUDGET = 1.5  # seconds beyond torch
PLAIN = "import numpy, torch"
WHOLE = f"{PLAIN}, recog_fast"


def own(program: str) -> dict[str, float]:
    """Module -> seconds it took by itself, in a fresh interpreter that runs `program`."""
    text = subprocess.run([sys.executable, "-X", "importtime", "-c", program], check=True, capture_output=True, text=True).stderr
    return {name: int(micro) / 1e6 for micro, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", text)}


def measure(rounds: int) -> tuple[float, dict[str, float]]:
    """Seconds of all that torch and NumPy load, and of each module that recog_fast loads besides: the rounds of the least sums."""
    plain = min((own(PLAIN) for _ in range(rounds)), key=lambda times: sum(times.values()))
    wholes = [{name: t for name, t in own(WHOLE).items() if name not in plain} for _ in range(rounds)]
    return sum(plain.values()), min(wholes, key=lambda times: sum(times.values()))


def main() -> None:
    """Prints the medians and the slowest modules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modules", type=int, default=8)
    options = parser.parse_args()
    plain, more = measure(options.rounds)
    print(f"torch and NumPy {plain:.2f} s; recog_fast {sum(more.values()):.2f} s more, {len(more)} modules (budget {BUDGET} s)")
    for name, seconds in sorted(more.items(), key=lambda item: -item[1])[: options.modules]:
        print(f"{1000 * seconds:8.1f} ms  {name}")


if __name__ == "__main__":
    main()
