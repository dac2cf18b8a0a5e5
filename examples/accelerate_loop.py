"""Accelerate: the backbone is prepared, the head stays outside and keeps its fused optimizer."""

import torch
from accelerate import Accelerator

import recog_fast as rf


def main(epochs: int = 3) -> list[float]:
    torch.manual_seed(0)
    labels = torch.arange(50).repeat(16)
    images = torch.randn(50, 32)[labels] + 0.3 * torch.randn(800, 32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=64, shuffle=True)
    backbone = torch.nn.Linear(32, 16)
    accelerator = Accelerator(cpu=True)  # bfloat16 on a GPU: mixed_precision="bf16"; a GradScaler ("fp16") is refused
    backbone, optimizer, loader = accelerator.prepare(
        backbone, torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9), loader
    )
    head = rf.MarginHead(50, 16, margin=rf.ArcFace(0.2), scale=16.0).to(accelerator.device)
    head_optimizer = rf.HeadSGD(head, lr=0.1)
    losses = []
    for _ in range(epochs):
        for batch, target in loader:
            loss = head(backbone(batch), target)
            accelerator.backward(loss)
            for each in (optimizer, head_optimizer):
                each.step()
                each.zero_grad()
            losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
