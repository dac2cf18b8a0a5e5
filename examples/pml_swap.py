"""pytorch-metric-learning's loss changed for the fused one: one import, the rest of the script as it was."""

import torch

from recog_fast.compat.pml import ArcFaceLoss  # was: from pytorch_metric_learning.losses import ArcFaceLoss


def main(steps: int = 40, loss_class: type = ArcFaceLoss) -> list[float]:
    torch.manual_seed(0)
    centres = torch.randn(50, 32)
    backbone = torch.nn.Linear(32, 16)
    loss_func = loss_class(num_classes=50, embedding_size=16, margin=15, scale=16)
    optimizer = torch.optim.SGD([{"params": backbone.parameters()}, {"params": loss_func.parameters(), "lr": 1.0}], lr=0.1)
    losses = []
    for _ in range(steps):
        labels = torch.randint(50, (64,))
        loss = loss_func(backbone(centres[labels] + 0.3 * torch.randn(64, 32)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
