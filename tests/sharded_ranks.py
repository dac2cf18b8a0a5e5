"""What ranks run in the tests of sharded heads; apart from the tests, which are slow to import."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from sharded import D, Problem, build, one_step, optimizer_of, rows_of, state_of
from torch import Tensor
from waiting import no_waiting

import recog_fast as rf
from recog_fast.checkpoint import CheckpointError, files, load_checkpoint, save_checkpoint, save_checkpoint_async


def head_of(group: Any, options: dict[str, Any]) -> rf.MarginHead:
    torch.manual_seed(3)
    return rf.MarginHead(**{"num_classes": 30, "embedding_dim": D, "group": group, **options})


def golden_rank(group: Any, name: str, cuts: list[int], x: Tensor, w: Tensor, y: Tensor, upstream: Tensor, scale: float) -> dict[str, Tensor]:
    """The head with the case's own ranges: a group whose classes are cut where the case cuts them."""
    head = head_of(group, {"num_classes": len(w), "embedding_dim": x.shape[1], "margin": rf.ArcFace(), "scale": scale, "ddp_average": False}).double()
    rank = head.shards.rank  # type: ignore[union-attr]
    head.shards.start, head.shards.stop = cuts[rank], cuts[rank + 1]  # type: ignore[union-attr]
    head.first_class = cuts[rank]
    head.weight = torch.nn.Parameter(w[cuts[rank] : cuts[rank + 1]].clone())
    own = slice(len(x) * rank // len(cuts[1:]), len(x) * (rank + 1) // len(cuts[1:]))
    rows = x[own].clone().requires_grad_()
    loss, stats = head(rows, y[own], reduction="none", return_stats=True)
    (loss * upstream[own]).sum().backward()
    assert rows.grad is not None and head.weight.grad is not None
    return {"loss": loss.detach(), "nn_cos": stats.nearest_cosine, "nn_idx": stats.nearest_index, "lse_neg": stats.lse, "dX": rows.grad, "dW": head.weight.grad}


def ddp_rank(group: Any, average: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    backbone: torch.nn.Module = torch.nn.Linear(7, D).double()
    if group is not None and average:
        backbone = torch.nn.parallel.DistributedDataParallel(backbone, process_group=group)
    head = head_of(group, {"margin": rf.AdaFace(), "ddp_average": average}).double()
    images, labels = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)).double(), torch.arange(9) * 3
    own = slice(0, 9) if group is None else [slice(0, 2), slice(2, 6), slice(6, 9)][head.shards.rank]  # type: ignore[union-attr]
    head(backbone(images[own]), labels[own]).backward()
    gradient = next(backbone.parameters()).grad
    assert gradient is not None and head.weight.grad is not None
    return gradient, head.weight.grad


def error_of(group: Any, case: str) -> str:
    """What a rank says when rank 1 does something else than the others."""
    rank = torch.distributed.get_rank(group)
    odd = rank == 1
    try:
        build, _, call = case.partition("/")
        options = {"num_classes": {"num_classes": 31}, "margin": {"margin": rf.CosFace()}, "scale": {"scale": 8.0}}.get(build, {})
        memory = rf.PrototypeMemory(31 if build == "num_classes" and odd else 30, D, rf.VPL(delta=9 if build == "policy" and odd else 5, start=0))
        head = head_of(group, {"memory": memory, **(options if odd else {})})
        optimizer = rf.HeadSGD(head, 0.1) if not (case == "run/optimizer" and odd) else None
        x, labels = torch.ones(3, D, requires_grad=True), torch.tensor([0, 5, 29])
        arguments: dict[str, Any] = {"keys": x.detach()}
        if odd and call == "labels":
            labels = torch.tensor([0, 30, 2])
        if odd and call == "nan":
            x = torch.full((3, D), float("nan"))
        if odd and call == "reduction":
            arguments["reduction"] = "sum"
        if odd and call == "keys":
            arguments.pop("keys")
        if odd and call == "topk":
            head.topk(x, 2)
        if odd and call == "width":
            x = torch.ones(3, D + 1)
        if call == "write":
            head.memory.write(x, labels + 28 * odd, 0)  # type: ignore[union-attr]
        head(x, labels, **arguments).backward()
        if optimizer is not None:
            optimizer.step()
        return f"none: {int(head.steps)}"
    except (ValueError, RuntimeError) as error:
        state = (int(head.steps), head.memory.pending, float(head.memory.clock)) if call else ()  # type: ignore[union-attr]
        return f"{type(error).__name__}: {error} {state}"


def without_group(group: Any) -> str:
    with pytest.raises(ValueError) as error:
        rf.MarginHead(30, D)
    return str(error.value)


def copies(group: Any) -> list[bool]:
    head = head_of(group, {})
    twin = copy.deepcopy(head)
    x, labels = torch.ones(2, D), torch.tensor([1, 29])
    same = torch.equal(head(x, labels), twin(x, labels))
    with pytest.raises(TypeError, match="got a sharded one: use save_checkpoint"):
        pickle.dumps(head)
    return [same, head.shards is twin.shards]


SIZES = {1: (7,), 2: (5, 2), 3: (3, 0, 4), 4: (1, 3, 0, 3)}
BEFORE, AFTER = 4, 20
PROBLEMS = {
    "memory": Problem(SIZES[1], classes=31, policy="qaface", margin="adaface", options={"unknown_weight": 0.1}),
    "SGD": Problem(SIZES[1], classes=10, margin="curricular", fused=False),  # 4 ranks: 3, 3, 3, 1
    "empty shards": Problem(SIZES[1], classes=5, policy="vpl", options={"subcenters": 1}),
    "subcenters": Problem(SIZES[1], options={"subcenters": 2, "drop_mass": 0.01}),
}


def slice_of(world: int, rank: int) -> slice:
    return slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))


def run(group: Any, problem: Problem, load: str | None, save: str | None, steps: range, later: bool = False) -> list[dict[str, Tensor]]:
    """Steps of a head, restored before and saved after them; the losses and the state at the end."""
    head = build(problem, group)
    world, rank = (1, 0) if group is None else (head.shards.size, head.shards.rank)  # type: ignore[union-attr]
    if load is not None:
        with torch.no_grad():
            head.weight.normal_()
    optimizer = optimizer_of(problem, head)
    if load is not None:
        assert load_checkpoint(load, head=head, optimizer=optimizer) == {"step": steps.start, "note": {"rank": torch.tensor(0)}}
    problem = dataclasses.replace(problem, sizes=SIZES[world])
    losses = []
    for step in steps:
        out = one_step(problem, head, optimizer, step, slice_of(world, rank))
        losses.append({"loss": out["loss 0"], "stats": out["lse 0"]})
    if save is not None:
        if head.memory is not None:
            head.memory.flush()
        note = {"rank": torch.tensor(rank)}
        if later:
            done = save_checkpoint_async(save, head=head, optimizer=optimizer, step=steps.stop, note=note)
            one_step(problem, head, optimizer, steps.stop, slice_of(world, rank))  # goes on meanwhile
            done.result(30)
        else:
            save_checkpoint(save, head=head, optimizer=optimizer, step=steps.stop, note=note)
    return [*losses, state_of(head, optimizer)]


def failing_save(group: Any, path: str, where: str) -> str:
    """A save during which rank 1 (or 0, which publishes) cannot write."""
    problem = PROBLEMS["memory"]
    head = build(problem, group)
    rank = head.shards.rank  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("disk full")

        if where == "tensors" and rank == 1:
            patch.setattr(files, "_entry", refuse)
        if where == "publish" and rank == 0:
            patch.setattr(files, "_fsync", refuse)
        if where == "pending" and rank == 1:
            head.memory._queue.append(None)  # type: ignore[union-attr, arg-type]
        try:
            save_checkpoint(path, head=head, step=1)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "saved"


def refused_load(group: Any, path: str, change: str) -> tuple[str, bool]:
    """What a head of another model says, and whether it is as it was."""
    problem = PROBLEMS["memory"]
    if change == "classes":
        problem = dataclasses.replace(problem, classes=32)
    if change == "margin":
        problem = dataclasses.replace(problem, margin="arcface")
    if change == "no memory":
        problem = dataclasses.replace(problem, policy=None)
    if change == "subcenters":
        problem = dataclasses.replace(problem, policy=None, options={"subcenters": 2})
    head = build(problem, group)
    optimizer = torch.optim.AdamW([head.weight]) if change == "optimizer" else optimizer_of(problem, head)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    try:
        load_checkpoint(path, head=head, optimizer=optimizer)
    except CheckpointError as error:
        same = all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
        return str(error), same
    return "loaded", False


def messages_of(group: Any, problem: Problem) -> tuple[list[tuple[str, int]], list[int]]:
    """(kind, bytes) of every collective of one training step of this rank, and unlabelled rows of all ranks."""
    head = build(problem, group)
    optimizer = optimizer_of(problem, head)
    rank = head.shards.rank  # type: ignore[union-attr]
    first = sum(problem.sizes[:rank])
    seen: list[tuple[str, int]] = []
    names = {"all_gather_single": "all-gather", "all_gather_into_tensor": "all-gather", "all_reduce": "all-reduce"}
    names |= {"reduce_scatter_single": "reduce-scatter", "reduce_scatter_tensor": "reduce-scatter"}
    others = ("all_to_all_single", "all_gather_object", "broadcast", "barrier", "all_gather", "reduce", "send", "scatter")
    distributed = torch.distributed
    with pytest.MonkeyPatch.context() as patch:
        for name in (*names, *others):
            if hasattr(distributed, name):
                patch.setattr(distributed, name, _counting(getattr(distributed, name), names.get(name, name), seen))
        one_step(problem, head, optimizer, 0, slice(first, first + problem.sizes[rank]))
    labels = rows_of(problem, 0)[1].split(list(problem.sizes))
    return seen, [int((part == -1).sum()) for part in labels]


def _counting(call: Any, kind: str, seen: list[tuple[str, int]]) -> Any:
    def counted(*arguments: Any, **options: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        seen.append((kind, tensors[-1].numel() * tensors[-1].element_size() if tensors else -1))
        return call(*arguments, **options)

    return counted


def part_of_head(group: Any, problem: Problem) -> dict[str, int]:
    """Bytes of what a rank's head and optimizer hold after a step."""
    head = build(problem, group)
    optimizer = optimizer_of(problem, head)
    rank = 0 if group is None else head.shards.rank  # type: ignore[union-attr]
    first = sum(problem.sizes[:rank])
    one_step(problem, head, optimizer, 0, slice(first, first + problem.sizes[rank]))
    state = [t for t in optimizer.state.get(head.weight, {}).values() if t.dim()]
    held = [] if head.memory is None else [head.memory.ring, head.memory.ring_strength, head.memory.stamp, head.memory.owner, head.memory.slot]
    return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in (("W", [head.weight]), ("state", state), ("memory", held))}


def cosine_steps(group: Any, problem: Problem) -> list[dict[str, Tensor]]:
    """HeadSGD steps from attached cosines, alone and beside the loss; ids of one shard's classes at first."""
    head = build(problem, group)
    optimizer = optimizer_of(problem, head)
    rank = 0 if group is None else head.shards.rank  # type: ignore[union-attr]
    first = sum(problem.sizes[:rank])
    own = slice(0, sum(problem.sizes)) if group is None else slice(first, first + problem.sizes[rank])
    out = []
    with rf.ops.use_backend("reference"):
        for step in range(3):
            x, labels, weights = (t[own] for t in rows_of(problem, step))
            x = x.clone().requires_grad_()
            ids = labels.clamp_min(0) % (3 if step == 0 else problem.classes)
            loss = (head.cosine(x, ids) * weights).sum()
            if step == 2:
                loss = loss + head(x, labels, normalizer=1.0)
            loss.backward()
            optimizer.step()
            assert x.grad is not None
            out.append({"dx": x.grad, "W": head.weight.detach().clone()})
    return out


def gradients_of_ddp(group: Any, cap: float) -> tuple[list[int], list[int]]:
    """Bytes of every all-reduce that DistributedDataParallel makes in its second step, and of the gradients in the order they are ready."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    torch.manual_seed(3)
    layers = [torch.nn.Linear(40, 300), torch.nn.Linear(300, 200), torch.nn.Linear(200, 500), torch.nn.Linear(500, D)]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers), process_group=group, bucket_cap_mb=cap)
    seen: list[int] = []
    ready: list[int] = []

    def reduce(_: object, bucket: Any) -> Any:
        seen.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    reduce.__annotations__.clear()  # torch wants the classes themselves or none
    model.register_comm_hook(None, reduce)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: ready.append(4 * p.numel()))
    for step in range(2):
        seen.clear()
        ready.clear()
        model(torch.randn(3, 40, generator=torch.Generator().manual_seed(step))).sum().backward()
    return seen, ready


DEFERS = ("recog_fast.ops._flags.defers", "recog_fast.losses.defers", "recog_fast.sharding.rows.defers", "recog_fast.memory.prototypes.defers")


def spoiled_rows(problem: Problem, nonfinite: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x and labels of step 1 with two bad rows, one of the first rank and one of the last, and a mask of the good ones."""
    x, labels, _ = rows_of(problem, 10)
    at = [1, len(x) - 1]
    x[at[0], 2] = float("nan") if nonfinite else x[at[0], 2]
    labels[at[0]] = labels[at[0]] if nonfinite else -9
    labels[at[1]] = problem.classes + 7
    return x, labels, torch.tensor([i not in at for i in range(len(x))])


def deferred_steps(group: Any, problem: Problem, nonfinite: bool) -> dict[str, Any]:
    """A clean step, one with bad rows that nobody may look at, and what the next two forwards say; CPU tensors taken for a device's.

    group None: the same with the bad rows left out beforehand. With labels "mixed" or CurricularFace the step may wait.
    """
    x, labels, good = spoiled_rows(problem, nonfinite)
    if group is None:
        x, labels, own = x[good], labels[good], slice(0, int(good.sum()))
    else:
        first = sum(problem.sizes[: torch.distributed.get_rank(group)])
        own = slice(first, first + problem.sizes[torch.distributed.get_rank(group)])
    with contextlib.ExitStack() as patches:
        for place in DEFERS if group is not None else ():
            patches.enter_context(mock.patch(place, return_value=True))
        head = build(problem, group)
        optimizer = optimizer_of(problem, head)
        one_step(problem, head, optimizer, 0, slice(0, sum(problem.sizes)) if group is None else own)
        optimizer.zero_grad()
        leaf = x[own].clone().requires_grad_()
        with no_waiting(group is not None and problem.labels != "mixed" and problem.margin != "curricular"):
            keys = None if head.memory is None else leaf.detach()
            loss, stats = head(leaf, labels[own], keys=keys, return_stats=True)
            loss.backward()
            optimizer.step()
        assert leaf.grad is not None
        found: dict[str, Any] = {"loss": loss.detach(), "dx": leaf.grad, "lse": stats.lse, **state_of(head, optimizer), "said": []}
        for step in (2, 3) if group is not None else ():
            try:
                one_step(problem, head, optimizer, step, own)
                found["said"].append("")
            except ValueError as error:
                found["said"].append(str(error))
    return found
