"""DistributedDataParallel around the backbone, the head's classes spread over the ranks: torchrun --nproc-per-node 2 examples/ddp.py

Each rank gives the head its own rows; the loss is the mean over all of them. DDP averages the backbone's gradient over the ranks,
so the head multiplies what it sends back by their number (ddp_average=True, the default)."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import recog_fast as rf


def main(steps: int = 30) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same start everywhere
    centres = torch.randn(100, 32)
    head = rf.MarginHead(100, 16, margin=rf.CosFace(0.2), scale=16.0, group=dist.group.WORLD)
    backbone = DistributedDataParallel(torch.nn.Linear(32, 16))
    optimizers = [torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9), rf.HeadSGD(head, lr=0.1)]
    torch.manual_seed(dist.get_rank() + 1)  # another batch on every rank
    for step in range(steps):
        labels = torch.randint(100, (32,))
        loss = head(backbone(centres[labels] + 0.3 * torch.randn(32, 32)), labels)
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        if step in (0, steps - 1):
            dist.all_reduce(square := head.weight.detach().square().sum())
            print(f"rank {dist.get_rank()} loss {loss.item():.6f} |W| {square.sqrt().item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
