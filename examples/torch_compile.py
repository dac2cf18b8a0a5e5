"""torch.compile of the backbone; the head stays outside, its sweeps are compiled kernels already."""

import torch

import recog_fast as rf


def main(steps: int = 30, backend: str = "inductor") -> list[float]:
    torch.manual_seed(0)
    centres = torch.randn(50, 32)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.PReLU(), torch.nn.Linear(64, 16))
    backbone = torch.compile(model, backend=backend)
    head = rf.MarginHead(50, 16, margin=rf.ArcFace(0.2), scale=16.0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rf.HeadSGD(head, lr=0.1)]
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
