"""A training loop over any number of processes that survives losing one of them: the pattern, on made-up data.

    torchrun --nproc-per-node 2 --max-restarts 10 tools/train_ranks.py runs/ranks --steps 200

Every rank runs the backbone (DistributedDataParallel) on its rows of the step and holds its classes of the head. A checkpoint every
`--save` steps, by all ranks together; whoever starts goes on from the newest one that is whole. A rank that dies takes the others with it
(torchrun), all start again, and the losses are those of an undisturbed run: rows depend on seed and step alone. SIGTERM and SIGUSR1 to any
rank: all save after the step in progress and end. Losses go to losses.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import recog_fast as rf
from recog_fast.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

CLASSES, IMAGE, D = 101, 24, 16


def rows_of(step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Images and labels of all ranks at a step: noisy copies of one vector per class."""
    g = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (batch,), generator=g)
    centres = torch.randn(CLASSES, IMAGE, generator=torch.Generator().manual_seed(7))
    return centres[labels] + 0.3 * torch.randn(batch, IMAGE, generator=g), labels


def main() -> None:
    """Trains until `--steps` or a signal."""
    options = arguments()
    join_ranks()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    backbone = nn.parallel.DistributedDataParallel(nn.Linear(IMAGE, D))
    memory = rf.PrototypeMemory(CLASSES, D, rf.QAFace(inject_scale=0.1))
    head = rf.MarginHead(CLASSES, D, margin=rf.AdaFace(), scale=32.0, memory=memory, group=dist.group.WORLD)
    head_optimizer = rf.HeadSGD(head, lr=0.1)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9)
    folder, step = Path(options.output), 0
    newest = latest_checkpoint(folder / "checkpoints", verified=True)
    if newest is not None:
        saved = load_checkpoint(newest, head=head, optimizer=head_optimizer)
        step = saved["step"]
        backbone.load_state_dict(saved["backbone"])
        optimizer.load_state_dict(saved["backbone_optimizer"])
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda got, _: stopped.append(got))
    while step < options.steps:
        images, labels = (t.chunk(ranks)[rank] for t in rows_of(step, options.batch))
        embeddings = backbone(images)
        loss = head(embeddings, labels, keys=embeddings.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head_optimizer.step()
        step += 1
        if rank == 0:
            with (folder / "losses.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "loss": float(loss.detach())}) + "\n")
        end = anyone(bool(stopped))
        if step % options.save == 0 or step == options.steps or end:
            save(folder, step, head, head_optimizer, backbone, optimizer)
        if end:
            break
    dist.destroy_process_group()


def join_ranks() -> None:
    """The default group, under torchrun with keys of this attempt alone.

    Its agent keeps one store over restarts (torch 2.13), where gloo would find the addresses of the ranks that died.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None:
        dist.init_process_group()
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=ranks)  # type: ignore[attr-defined]


def save(folder: Path, step: int, head: Any, head_optimizer: Any, backbone: nn.Module, optimizer: Any) -> None:
    """By every rank; rank 0 alone tidies up."""
    save_checkpoint(
        checkpoint_path(folder / "checkpoints", step), head=head, optimizer=head_optimizer, step=step,
        backbone=backbone.state_dict(), backbone_optimizer=optimizer.state_dict(),
    )  # fmt: skip
    if dist.get_rank() == 0:
        prune_checkpoints(folder / "checkpoints", 3)


def anyone(flag: bool) -> bool:
    """Whether any rank says so: a signal to one ends all after the same step."""
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--save", type=int, default=10)
    options = parser.parse_args()
    Path(options.output).mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
