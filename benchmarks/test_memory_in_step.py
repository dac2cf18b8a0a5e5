"""What a prototype memory adds to a step of the head: injection in its sweeps, and the write of 4096 rows."""

from __future__ import annotations

import math
import time
from dataclasses import asdict

import torch

import recog_fast as rf

from .problems import MARGIN, SCALE, Problem, make_problem
from .protocol import one_thread, paired_ratio, spread
from .store import Results

# N, C, D, rounds; entries valid at once: 1000 steps of N rows, as QAFace's Delta_t leaves them
_SIZES = {"toy": (8, 2000, 32, 2), "full": (64, 100_000, 512, 15)}
_WRITTEN = {"toy": 256, "full": 4096}


def _filled(problem: Problem, policy: rf.QAFace) -> rf.PrototypeMemory:
    """A memory of min(C, 1000 N) live entries of random classes."""
    rows, classes, dimension = problem.shape
    capacity = min(classes, 1000 * rows)
    memory = rf.PrototypeMemory(classes, dimension, policy, capacity=capacity)
    generator = torch.Generator().manual_seed(3)
    for labels in torch.randperm(classes, generator=generator)[:capacity].split(4096):
        memory.write(10 + torch.randn(len(labels), dimension, generator=generator), labels, 0)
        memory.flush()
    return memory


def _step(head: rf.MarginHead, optimizer: rf.HeadSGD, problem: Problem) -> float:
    """CPU seconds of forward, backward and update."""
    began = time.process_time()
    loss = head(problem.embeddings.detach().requires_grad_(), problem.labels)
    loss.backward()
    optimizer.step()
    return time.process_time() - began


def test_memory_in_a_step(sizes: str, results: Results) -> None:
    """Paired rounds: the step without memory, with a full one, and a write; recorded, and every entry is injected."""
    rows, classes, dimension, rounds = _SIZES[sizes]
    problem = make_problem("R0", rows, classes, dimension)
    memory = _filled(problem, rf.QAFace(inject_scale=0.176, delta=10**6))
    injected = memory.strength(1)
    heads = []
    for kept in (None, memory):
        head = rf.MarginHead(classes, dimension, margin=rf.ArcFace(MARGIN), scale=SCALE, memory=kept)
        with torch.no_grad():
            head.weight.copy_(problem.weight)
        heads.append((head, rf.HeadSGD(head, lr=1e-4)))
    apart = rf.PrototypeMemory(classes, dimension, rf.QAFace(), capacity=memory.capacity)
    generator = torch.Generator().manual_seed(4)
    embeddings = 10 + torch.randn(_WRITTEN[sizes], dimension, generator=generator)
    times: dict[str, list[float]] = {"plain": [], "injected": [], "write": []}
    with one_thread():
        for number in range(rounds + 1):
            found = [_step(*one, problem) for one in heads]
            labels = torch.randint(0, classes, (_WRITTEN[sizes],), generator=generator)
            began = time.process_time()
            apart.write(embeddings, labels, number)
            apart.flush()
            found.append(time.process_time() - began)
            if number > 0:  # the first round touches the pages
                for name, seconds in zip(times, found, strict=True):
                    times[name].append(seconds)
    shares = {
        "injection": [b / a - 1 for a, b in zip(times["plain"], times["injected"], strict=True)],
        "write": [w / a for a, w in zip(times["plain"], times["write"], strict=True)],
    }
    assert int((injected > 0).sum()) >= 0.95 * memory.capacity  # but for what tau rejects
    assert all(math.isfinite(value) for values in (*times.values(), *shares.values()) for value in values)
    results.add(
        "injection",
        {
            "N": rows, "C": classes, "D": dimension, "entries": memory.capacity, "written": _WRITTEN[sizes],
            "plain_s": asdict(spread(times["plain"])), "injected_s": asdict(spread(times["injected"])),
            "write_s": asdict(spread(times["write"])), "ratio": asdict(paired_ratio(times["plain"], times["injected"])),
            "injection_share": asdict(spread(shares["injection"])), "write_share": asdict(spread(shares["write"])),
        },
    )  # fmt: skip
