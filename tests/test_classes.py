"""Classes added to and merged in checkpoints: untouched classes keep their bits, training goes on, memory stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks, ranks
from sharded import Problem, build, one_step, optimizer_of
from torch import Tensor
from training_data import make_folder, settings

import recog_fast as rf
from recog_fast.checkpoint import (
    CheckpointError,
    add_classes,
    load_checkpoint,
    merge_classes,
    read_checkpoint,
    save_checkpoint,
)
from recog_fast.cli import main

processes = pytest.fixture(scope="module")(ranks)
C, D = 40, 12

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "planes": {"weight_format": "split"},
    "planes, bf16 momentum": {"weight_format": "split", "momentum_dtype": torch.bfloat16},
    "memory, adaptive": {"memory": True, "margin": True},
    "AdamW": {"optimizer": "adamw"},
}


def make(kind: str, classes: int = C) -> tuple[rf.MarginHead, Any]:
    options = dict(HEADS[kind])
    torch.manual_seed(5)
    dtype, adamw = options.pop("momentum_dtype", torch.float32), options.pop("optimizer", "") == "adamw"
    if options.pop("memory", False):
        options["memory"] = rf.PrototypeMemory(classes, D, rf.QAFace(inject_scale=0.2), dtype=torch.float32)
    if options.pop("margin", False):
        options["margin"] = rf.AdaFace()
    head = rf.MarginHead(classes, D, scale=16.0, sample_seed=1, **options)
    return head, torch.optim.AdamW([head.weight], lr=0.01) if adamw else rf.HeadSGD(head, lr=0.1, momentum_dtype=dtype)


def step(head: rf.MarginHead, optimizer: Any, labels: Tensor, seed: int = 0) -> float:
    x = torch.randn(len(labels), D, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    optimizer.zero_grad()
    loss = head(x, labels, keys=x.detach() if head.memory is not None else None)
    loss.backward()
    optimizer.step()
    if head.memory is not None:
        head.memory.flush()
    return float(loss.detach())


def saved(folder: Path, kind: str) -> tuple[Path, rf.MarginHead, Any]:
    head, optimizer = make(kind)
    for i in range(3):
        step(head, optimizer, torch.arange(i, C, 5), i)
    path = folder / "step_00000003"
    save_checkpoint(path, head=head, optimizer=optimizer, step=3, position={"seed": 1, "length": 100, "epoch": 2, "done": 32}, note=[1, "a"])
    return path, head, optimizer


def state_of(head: rf.MarginHead, optimizer: Any) -> dict[str, Tensor]:
    return {name: t for name, t in optimizer.state[head.weight].items() if t.dim()}


def same_classes(head: rf.MarginHead, mine: Tensor, other: rf.MarginHead, theirs: Tensor) -> None:
    """Prototypes bit for bit; logits to rounding, for a product of another width may sum in another order."""
    x = torch.randn(6, D)
    assert torch.equal(head.prototypes()[mine], other.prototypes()[theirs])
    torch.testing.assert_close(head.logits(x)[:, mine], other.logits(x)[:, theirs], rtol=0, atol=2e-6 * head.scale)


@pytest.mark.parametrize("kind", HEADS)
def test_added_classes_leave_the_others_as_they_were_and_train(tmp_path: Path, kind: str) -> None:
    path, old, old_optimizer = saved(tmp_path, kind)
    at = [0, 7, 41]
    directions = torch.randn(3, D)
    new = add_classes(path, tmp_path / "more", 3, directions=directions, at=at, images=120)
    assert new.tolist() == [i for i in range(C + 3) if i not in at]
    head, optimizer = make(kind, C + 3)
    more = load_checkpoint(tmp_path / "more", head=head, optimizer=optimizer)
    assert more["step"] == 3 and more["note"] == [1, "a"]
    assert more["position"] == {"seed": 1, "length": 120, "epoch": 2, "done": 0}
    same_classes(head, new, old, torch.arange(C))
    for name, value in state_of(head, optimizer).items():
        assert torch.equal(value[new], state_of(old, old_optimizer)[name])
        assert not value[at].any()
    weight = head.full_weight()
    assert torch.allclose(torch.nn.functional.cosine_similarity(weight[at], directions), torch.ones(3))
    assert torch.allclose(weight[at].norm(dim=1), old.full_weight().norm(dim=1).mean(), rtol=1e-5)
    if old.memory is not None:
        assert head.memory is not None
        mine, theirs = head.memory.entries(), old.memory.entries()
        assert torch.equal(mine.ids, new[theirs.ids]) and torch.equal(mine.rows, theirs.rows) and torch.equal(mine.stamp, theirs.stamp)
        assert torch.equal(head.memory.mean, old.memory.mean)
        assert torch.equal(head.margin.mean, old.margin.mean)  # type: ignore[attr-defined, union-attr]
    losses = [step(head, optimizer, torch.tensor([0, 7, 41, 3]), seed=9) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_drawn_classes_are_the_init_rules_and_the_seeds(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path, "plain")
    drawn = []
    for seed in (1, 1, 2):
        add_classes(path, tmp_path / "more", 500, seed=seed)
        drawn.append(read_checkpoint(tmp_path / "more", ("head",))["head"]["weight"][C:])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert float(drawn[0].std()) == pytest.approx(0.01, rel=0.05) and abs(float(drawn[0].mean())) < 1e-3


@pytest.mark.parametrize("kind", HEADS)
def test_merged_classes_are_the_mean_and_the_others_keep_their_logits(tmp_path: Path, kind: str) -> None:
    path, old, old_optimizer = saved(tmp_path, kind)
    counts = torch.arange(1, C + 1)
    new = merge_classes(path, tmp_path / "fewer", [[3, 10], [10, 25], [39, 1]], counts=counts)
    assert new[3] == new[10] == new[25] and new[1] == new[39] and sorted(set(new.tolist())) == list(range(C - 3))
    head, optimizer = make(kind, C - 3)
    load_checkpoint(tmp_path / "fewer", head=head, optimizer=optimizer)
    untouched = torch.tensor([i for i in range(C) if i not in (1, 3, 10, 25, 39)])
    if old.memory is None:
        same_classes(head, new[untouched], old, untouched)
    before, after = old.full_weight().double(), head.full_weight()
    for members in ([3, 10, 25], [1, 39]):
        share = (counts[members] / counts[members].sum()).double()
        norms = before[members].norm(dim=1)
        mean = torch.nn.functional.normalize(share @ (before[members] / norms[:, None]), dim=0) * (share @ norms)
        assert torch.allclose(after[new[members[0]]].double(), mean, rtol=1e-4, atol=1e-6)
        for name, value in state_of(head, optimizer).items():
            expected = share.float() @ state_of(old, old_optimizer)[name][members].float()
            assert torch.allclose(value[new[members[0]]].float(), expected, rtol=1e-2 if value.dtype == torch.bfloat16 else 1e-5, atol=1e-8)
    for name, value in state_of(head, optimizer).items():
        assert torch.equal(value[new[untouched]], state_of(old, old_optimizer)[name][untouched])
    if old.memory is not None:
        assert head.memory is not None
        theirs, mine = old.memory.entries(), head.memory.entries()
        newest = {int(c): (int(s), r) for s, c, r in sorted(zip(theirs.stamp.tolist(), new[theirs.ids].tolist(), theirs.rows, strict=True), key=lambda e: e[0])}
        assert mine.ids.tolist() == sorted(newest)
        assert all(stamp == newest[c][0] and torch.equal(row, newest[c][1]) for c, row, stamp in zip(mine.ids.tolist(), mine.rows, mine.stamp.tolist(), strict=True))
    losses = [step(head, optimizer, torch.tensor([int(new[3]), 5, 30]), seed=9) for _ in range(12)]
    assert losses[-1] < losses[0]


def train_and_save(group: Any, problem: Problem, folder: str) -> Tensor:
    head = build(problem, group)
    optimizer = optimizer_of(problem, head)
    rank = head.shards.rank  # type: ignore[union-attr]
    first = sum(problem.sizes[:rank])
    one_step(problem, head, optimizer, 0, slice(first, first + problem.sizes[rank]))
    save_checkpoint(folder, head=head, optimizer=optimizer, step=1)
    return head.weight.detach().clone()


def load_and_step(group: Any, problem: Problem, folder: str) -> Tensor:
    head = build(problem, group)
    optimizer = optimizer_of(problem, head)
    load_checkpoint(folder, head=head, optimizer=optimizer)
    loaded = head.weight.detach().clone()
    rank = head.shards.rank  # type: ignore[union-attr]
    first = sum(problem.sizes[:rank])
    one_step(problem, head, optimizer, 1, slice(first, first + problem.sizes[rank]))
    return loaded


def test_what_three_ranks_saved_is_edited_and_loads_on_two(processes: Ranks, tmp_path: Path) -> None:
    three, two = Problem((2, 1, 2), policy="vpl"), Problem((3, 2), classes=32, policy="vpl")
    weight = torch.cat(processes.run(3, train_and_save, three, str(tmp_path / "three")))
    new = add_classes(tmp_path / "three", tmp_path / "more", 2, at=[4, 20])
    assert torch.equal(torch.cat(processes.run(2, load_and_step, two, str(tmp_path / "more")))[new], weight)


def test_what_cannot_be_edited_is_refused(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path, "plain")
    target = tmp_path / "new"
    for call, text in (
        (lambda: add_classes(path, target, 0), "count >= 1"),
        (lambda: add_classes(path, target, 2, at=[5, 5]), "2 ascending ids below 42"),
        (lambda: add_classes(path, target, 1, at=[41]), "1 ascending ids below 41"),
        (lambda: add_classes(path, target, 1, directions=torch.zeros(1, D)), "not 0"),
        (lambda: add_classes(path, target, 2, directions=torch.ones(1, D)), "shape (2, 12)"),
        (lambda: merge_classes(path, target, []), "got none"),
        (lambda: merge_classes(path, target, [[3, 3]]), "two or more classes"),
        (lambda: merge_classes(path, target, [[3, C]]), "classes in [0, 40)"),
        (lambda: merge_classes(path, target, [[1, 2]], counts=torch.zeros(C)), "counts of 0"),
        (lambda: merge_classes(path, target, [[1, 2]], counts=torch.full((C,), torch.inf)), "finite counts"),
        (lambda: merge_classes(path, target, [[1, 2]], counts=torch.ones(3)), "shape (40,)"),
    ):
        with pytest.raises(ValueError) as refused:
            call()
        assert text in str(refused.value)
    assert not target.exists()
    head = rf.MarginHead(2, 4)
    with torch.no_grad():
        head.weight[1] = -head.weight[0]
    save_checkpoint(tmp_path / "opposite", head=head, step=0)
    with pytest.raises(ValueError, match="mean direction is 0"):
        merge_classes(tmp_path / "opposite", target, [[0, 1]])
    save_checkpoint(tmp_path / "centers", head=rf.MarginHead(3, 4, subcenters=2), step=0)
    with pytest.raises(ValueError, match="without sub-centers"):
        merge_classes(tmp_path / "centers", target, [[0, 1]])
    add_classes(tmp_path / "centers", target, 2, directions=torch.randn(2, 4))
    load_checkpoint(target, head=rf.MarginHead(5, 4, subcenters=2))
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        add_classes(path, tmp_path / "newer", 1)
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name or "rows" in p.name]


MEASURE = """
import sys, torch, recog_fast as rf
from recog_fast.checkpoint import add_classes, save_checkpoint
def anonymous():
    return [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')][0] * 1024
head = rf.MarginHead(int(sys.argv[2]), 64)
save_checkpoint(sys.argv[1] + '/a', head=head, step=0)
size = 4 * head.weight.numel()
del head
import threading, time
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002): peak[0] = max(peak[0], anonymous())
t = threading.Thread(target=watch); t.start()
add_classes(sys.argv[1] + '/a', sys.argv[1] + '/b', 3)
done.set(); t.join()
print(size, peak[0] - before)
"""


def test_a_large_head_is_not_in_memory(tmp_path: Path) -> None:
    """128 MB of W: what the process takes of its own (file pages apart) is a few blocks of 16 MB."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), "500000"], capture_output=True, text=True, check=True)
    size, grown = map(int, done.stdout.split())
    assert size == 128_000_000 and grown < 80_000_000, grown


def test_commands_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on 10 people; 4 more from a folder of images; trained on; two merged; trained on."""
    folder = make_folder(tmp_path / "faces", identities=14)
    paths = [(str(p), int(p.parent.name[2:])) for p in sorted(folder.glob("*/*.png"))]

    def write(name: str, rows: list[tuple[str, int]]) -> str:
        (tmp_path / name).write_text("".join(f"{path},{label}\n" for path, label in rows))
        return str(tmp_path / name)

    settings(tmp_path, folder, data__kind="list", data__path=write("ten.csv", [r for r in paths if r[1] < 10]), max_steps=3)
    assert main(["train", str(tmp_path / "settings.yaml")]) == 0
    new = tmp_path / "new"
    new.mkdir()
    for name in ("id10", "id11", "id12", "id13"):
        (new / name).symlink_to(folder / name)
    more, run = tmp_path / "more", tmp_path / "run"
    assert main(["classes", "add", str(run), str(more), "--images", str(new), "--total-images", str(len(paths))]) == 0
    weight = read_checkpoint(more / "checkpoints" / "step_00000003", ("head",))["head"]["weight"]
    assert weight.shape == (14, 16)
    data = ["--data.path", write("all.csv", paths), "--max_steps", "6", "--resume", "true"]
    assert main(["train", str(more / "config.yaml"), *data]) == 0
    assert read_checkpoint(more / "checkpoints" / "step_00000006", ("step",))["step"] == 6
    (tmp_path / "groups.csv").write_text("2,12\n\n")
    np.save(tmp_path / "counts.npy", np.full(14, 5))
    fewer = tmp_path / "fewer"
    assert main(["classes", "merge", str(more), str(fewer), "--groups", str(tmp_path / "groups.csv"), "--counts", str(tmp_path / "counts.npy")]) == 0
    told = dict(map(int, line.split(",")) for line in (fewer / "labels.csv").read_text().splitlines()[1:])  # type: ignore[arg-type]
    assert told[12] == told[2] == 2 and told[13] == 12
    data = ["--data.path", write("fewer.csv", [(path, told[label]) for path, label in paths]), "--max_steps", "8", "--resume", "true"]
    assert main(["train", str(fewer / "config.yaml"), *data]) == 0
    capsys.readouterr()
    for arguments, code, text in (
        (["add", str(run), str(more), "--count", "1"], 1, "new or empty output"),
        (["add", str(run), str(tmp_path / "x")], 2, "one of --count"),
        (["add", str(tmp_path / "new"), str(tmp_path / "x"), "--count", "1"], 1, "found none"),
        (["merge", str(run), str(tmp_path / "x"), "--groups", "a.txt"], 1, ".csv or .jsonl"),
    ):
        assert main(["classes", *arguments]) == code
        assert text in capsys.readouterr().err
