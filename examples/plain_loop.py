"""A plain training loop: the head next to any backbone, its fused optimizer next to any other optimizer."""

import torch

import recog_fast as rf


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    centres = torch.randn(200, 64)  # stands in for a data set: 200 people, noisy images of each
    backbone = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.PReLU(), torch.nn.Linear(128, 32))
    head = rf.MarginHead(num_classes=200, embedding_dim=32, margin=rf.ArcFace(0.3), scale=16.0)
    optimizers = [torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9), rf.HeadSGD(head, lr=0.1, momentum=0.9)]
    losses = []
    for _ in range(steps):
        labels = torch.randint(200, (128,))
        images = centres[labels] + 0.5 * torch.randn(128, 64)
        loss = head(backbone(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)  # the head's gradient never exists: clip the backbone
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    _, nearest = head.topk(backbone(centres).detach(), k=1)
    found = (nearest[:, 0] == torch.arange(200)).float().mean().item()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {found:.0%} of the people recognised")
    return losses


if __name__ == "__main__":
    main()
