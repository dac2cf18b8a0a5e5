"""DistributedDataParallel around the backbone, the head outside: torchrun --nproc-per-node 2 examples/ddp.py

Every rank's head sees the batch of all ranks, so all copies of W take the same step and W's gradient is never sent. The hook
undoes DDP's division of the backbone's gradient by the number of ranks: the loss is the global mean already."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import recog_fast as rf


def main(steps: int = 30) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same W everywhere
    world, rank = dist.get_world_size(), dist.get_rank()
    centres, head = torch.randn(100, 32), rf.MarginHead(100, 16, margin=rf.CosFace(0.2), scale=16.0)
    backbone = DistributedDataParallel(torch.nn.Linear(32, 16))
    optimizers = [torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9), rf.HeadSGD(head, lr=0.1)]
    torch.manual_seed(rank + 1)  # another batch on every rank
    for step in range(steps):
        labels = torch.randint(100, (32,))
        embeddings = backbone(centres[labels] + 0.3 * torch.randn(32, 32))
        embeddings.register_hook(lambda gradient: gradient * world)
        rows, ids = ([torch.empty_like(x) for _ in range(world)] for x in (embeddings, labels))
        dist.all_gather(rows, embeddings.detach())
        dist.all_gather(ids, labels)
        loss = head(torch.cat([*rows[:rank], embeddings, *rows[rank + 1 :]]), torch.cat(ids))
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        if step in (0, steps - 1):
            print(f"rank {rank} loss {loss.item():.6f} |W| {head.weight.norm().item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
