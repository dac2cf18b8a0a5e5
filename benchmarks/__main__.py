"""All pieces of the full sizes, each in a process of its own, merged into this machine's results: `python -m benchmarks [WORD...]`.

WORD: only pieces whose id holds one of these words; `--list` shows them; other options (`--results DIR`) go to pytest. A
piece takes seconds to minutes (the largest about 8); one that is stopped or fails leaves the others' results as they are.
"""

from __future__ import annotations

import subprocess
import sys
import time

from .machine import ROOT, repository_environment

_ONCE = ("test_protocol", "test_required")  # no measurements: the first is for toy sizes, the second judges what is stored


def _pytest(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--sizes", "full", *arguments]
    return subprocess.run(command, cwd=ROOT, env=repository_environment(), text=True, capture_output=capture)


def pieces() -> list[str]:
    """The pytest ids of everything that measures."""
    shown = _pytest("benchmarks", "--collect-only", capture=True)
    ids = [line.strip() for line in shown.stdout.splitlines() if "::" in line]
    if not ids:
        raise RuntimeError(f"benchmarks: pytest collected nothing: {shown.stdout[-500:]}{shown.stderr[-500:]}")
    return [i for i in ids if not any(word in i for word in _ONCE)]


def main(arguments: list[str]) -> int:
    """Exit status 1 where a piece or a required number failed."""
    first_option = next((k for k, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    words, options = arguments[:first_option], arguments[first_option:]
    wanted = [i for i in pieces() if not words or any(w in i for w in words)]
    if options == ["--list"]:
        print("\n".join(wanted))
        return 0
    failed = []
    for piece in wanted:
        start = time.perf_counter()
        done = _pytest(piece, *options, capture=True)
        print(f"{time.perf_counter() - start:6.0f} s  {'ok' if done.returncode == 0 else 'FAILED'}  {piece}", flush=True)
        if done.returncode != 0:
            failed.append(piece)
            print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
    required = _pytest("benchmarks/test_required.py", *options)
    return 1 if failed or required.returncode else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
