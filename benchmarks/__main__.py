"""All pieces of the full sizes, each in a process of its own, merged into this machine's results: `python -m benchmarks [WORD...]`.

WORD: only pieces whose id holds one of these words; `--list` shows them; other options (`--results DIR`) go to pytest. A
piece takes seconds to minutes (the largest about 8); one that is stopped or fails leaves the others' results as they are.
"""

from __future__ import annotations

import subprocess
import sys
import time

from .machine import ROOT, repository_environment

_NO_MEASUREMENT = ("test_protocol", "test_stored", "test_required", "test_processes")
_ALONE = ("test_gates_and_times", "test_time_per_class")  # minutes each


def _pytest(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--sizes", "full", *arguments]
    return subprocess.run(command, cwd=ROOT, env=repository_environment(), text=True, capture_output=capture)


def pieces(words: list[str]) -> list[list[str]]:
    """Lists of pytest ids, each for one process: those of everything that measures and whose id holds a word, if any are given."""
    shown = _pytest("benchmarks", "--collect-only", capture=True)
    ids = [line.strip() for line in shown.stdout.splitlines() if "::" in line]
    if not ids:
        raise RuntimeError(f"benchmarks: pytest collected nothing: {shown.stdout[-500:]}{shown.stderr[-500:]}")
    grouped: dict[str, list[str]] = {}
    for each in ids:
        if not any(name in each for name in _NO_MEASUREMENT) and (not words or any(word in each for word in words)):
            grouped.setdefault(_group(each), []).append(each)
    return list(grouped.values())


def _group(each: str) -> str:
    """Ids of one group run in one process: an operation, the memory at one C, all threads; a case or a scaling alone."""
    test, _, parameter = each.partition("[")
    if any(name in test for name in _ALONE):
        return each
    return test + parameter.rpartition("x")[2] if "test_peak_memory" in test else test


def main(arguments: list[str]) -> int:
    """Exit status 1 where a piece or a required number failed."""
    listed = "--list" in arguments
    arguments = [a for a in arguments if a != "--list"]
    first_option = next((k for k, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    words, options = arguments[:first_option], arguments[first_option:]
    failed = 0
    for number, piece in enumerate(pieces(words)):
        if listed:
            print(f"piece {number}:", *piece, sep="\n    ")
            continue
        start = time.perf_counter()
        done = _pytest(*piece, *options, capture=True)
        failed += done.returncode != 0
        print(f"{time.perf_counter() - start:6.0f} s  {'FAILED' if done.returncode else 'ok'}  {', '.join(piece)}", flush=True)
        if done.returncode != 0:
            print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
    if listed:
        return 0
    required = _pytest("benchmarks/test_required.py", *options)
    return 1 if failed or required.returncode else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
