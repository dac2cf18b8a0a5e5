"""Tasks in processes of their own: a kernel that faults ends one process and one task, not the suite.

A worker reads task names from its standard input and answers each with one line of JSON; the parent gives every task a limit,
replaces a worker that died or hangs, and goes on.
"""

from __future__ import annotations

import collections
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Answer = dict[str, Any]
MARK = "@@ "  # in front of a line that is an answer: libraries print too
STARTUP = 120.0  # seconds a new worker may take before its first task: imports and the CUDA context


def run_limited(command: list[str], environment: dict[str, str], folder: Path, log: Path, seconds: float) -> int | None:
    """Exit status of a command whose output goes to `log`; None where it took longer: it is then ended with all it started."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


class Named(Protocol):
    """What the pool needs of a task."""

    @property
    def name(self) -> str:
        """Unique."""

    @property
    def seconds(self) -> float:
        """How long it is expected to take."""


@dataclass
class Worker:
    """One process, started at need."""

    command: list[str]
    environment: dict[str, str]
    log: Path
    _process: subprocess.Popen[bytes] | None = None
    _rest: bytes = b""

    def ask(self, name: str, seconds: float, limit: float) -> Answer:
        """The answer to one task, `seconds` told to the worker; {"died": why} where none came within `limit`: the process is then gone."""
        if self._process is None:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self.environment)
            self._rest, limit = b"", limit + STARTUP
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{json.dumps([name, seconds])}\n".encode())
            self._process.stdin.flush()
            answer = self._read(limit)
        except BrokenPipeError:
            answer = None
        if answer is None:
            code = self._process.poll()
            self.close(now=True)
            why = f"no answer within {limit:.0f} s" if code is None else f"the process ended with {code}"
            return {"died": f"{why}; {_tail(self.log)}"}
        if answer.get("fatal") or answer.get("restart"):  # the context is lost, or the allocator is not as it was
            self.close(now=True)
        return answer

    def _read(self, limit: float) -> Answer | None:
        """The next line that is an answer; None at the end of the output or of the time."""
        assert self._process is not None and self._process.stdout is not None
        end, pipe = time.monotonic() + limit, self._process.stdout.fileno()
        while True:
            while b"\n" in self._rest:
                line, _, self._rest = self._rest.partition(b"\n")
                if line.startswith(MARK.encode()):
                    answer: Answer = json.loads(line[len(MARK) :])
                    return answer
            ready, _, _ = select.select([pipe], [], [], max(end - time.monotonic(), 0.0))
            data = os.read(pipe, 1 << 16) if ready else b""
            if not data:
                if not ready:
                    return None
                self._process.wait(timeout=10)
                return None
            self._rest += data

    def close(self, now: bool = False) -> None:
        """Ends the process: at once, or when it has nothing left to read."""
        process, self._process = self._process, None
        if process is None:
            return
        if now:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    return lines[-1][-300:] if lines else "it said nothing"


class Pool:
    """`count` workers that take tasks in order; `done(task, answer, seconds)` is called for each, `left()` gives the seconds that remain."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, count: int) -> None:
        self._workers = [Worker(command, environment, log) for _ in range(count)]

    def run(self, tasks: Sequence[Named], left: Callable[[], float], done: Callable[[Any, Answer, float], None]) -> None:
        """Every task once; a task that does not fit into the time left is answered {"no_time": ...}."""
        queue, lock = collections.deque(tasks), threading.Lock()

        def work(worker: Worker) -> None:
            while True:
                with lock:
                    if not queue:
                        return
                    task = queue.popleft()
                began, rest = time.monotonic(), left()
                if rest < min(0.6 * task.seconds, 60.0) or rest < 3.0:
                    answer: Answer = {"no_time": f"{rest:.0f} s were left of the budget, it takes about {task.seconds:.0f}"}
                else:
                    given = min(rest, 2 * task.seconds + 10)
                    answer = worker.ask(task.name, given, limit=min(2 * given + 20, rest + 60))
                with lock:
                    done(task, answer, time.monotonic() - began)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in self._workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in self._workers:
            worker.close()


def serve(run: Callable[[str, float], Answer], lines: Sequence[str] | Any) -> int:
    """The worker's side: answers every line of `lines` with `run(name, seconds)`; 3 where the next one wants another process."""
    for line in lines:
        name, seconds = json.loads(line)
        answer = run(name, seconds)
        print("\n" + MARK + json.dumps(answer), flush=True)  # whatever was printed without an end of line
        if answer.get("fatal") or answer.get("restart"):
            return 3
    return 0
