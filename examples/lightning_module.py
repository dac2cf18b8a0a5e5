"""Lightning: the head and its fused optimizer in a LightningModule with manual optimization."""

from typing import Any

import lightning
import torch

import recog_fast as rf


class Recognizer(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.losses = False, []  # two optimizers take each step together
        self.backbone = torch.nn.Linear(32, 16)
        self.head = rf.MarginHead(50, 16, margin=rf.ArcFace(0.2), scale=16.0)
        self.head_optimizer = rf.HeadSGD(self.head, lr=0.1)  # no torch.optim.Optimizer: stepped here

    def training_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        loss = self.head(self.backbone(images), labels)
        self.manual_backward(loss)
        for optimizer in (self.optimizers(), self.head_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9)


def main(epochs: int = 3) -> list[float]:
    torch.manual_seed(0)
    labels = torch.arange(50).repeat(16)
    images = torch.randn(50, 32)[labels] + 0.3 * torch.randn(800, 32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=64, shuffle=True)
    model = Recognizer()
    lightning.Trainer(accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False).fit(model, loader)
    return model.losses
