"""A margin of one's own in three lines: any differentiable function of target cosines (N,) and feature norms (N,)."""

import torch

import recog_fast as rf


def shrinking(cosine: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    hard = 1.0 - cosine.detach().clamp(0.0, 1.0)  # a larger margin the farther a row is from its class
    return cosine - 0.1 - 0.3 * hard


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    centres = torch.randn(50, 32)
    backbone = torch.nn.Linear(32, 16)
    head = rf.MarginHead(50, 16, margin=shrinking, scale=16.0)
    optimizers = [torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9), rf.HeadSGD(head, lr=0.1)]
    losses = []
    for _ in range(steps):
        labels = torch.randint(50, (64,))
        loss = head(backbone(centres[labels] + 0.3 * torch.randn(64, 32)), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
