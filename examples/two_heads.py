"""Two heads and an auxiliary loss on one embedding: summed for one backward, or one after the other with retain_graph."""

import torch
import torch.nn.functional as F

import recog_fast as rf


def main(steps: int = 40, separately: bool = False) -> list[float]:
    torch.manual_seed(0)
    centres, family = torch.randn(60, 32), torch.arange(60) // 3  # 60 people of 20 families
    backbone, decoder = torch.nn.Linear(32, 16), torch.nn.Linear(16, 32)
    people = rf.MarginHead(60, 16, margin=rf.ArcFace(0.2), scale=16.0)
    families = rf.MarginHead(20, 16, margin=rf.CosFace(0.1), scale=16.0)
    parameters = [*backbone.parameters(), *decoder.parameters()]
    optimizers = [torch.optim.SGD(parameters, lr=0.05), rf.HeadSGD(people, lr=0.1), rf.HeadSGD(families, lr=0.1)]
    history = []
    for _ in range(steps):
        labels = torch.randint(60, (64,))
        images = centres[labels] + 0.3 * torch.randn(64, 32)
        embeddings = backbone(images)
        losses = [people(embeddings, labels), 0.5 * families(embeddings, family[labels])]
        losses.append(0.1 * F.mse_loss(decoder(embeddings), images))
        if separately:
            for k, loss in enumerate(losses):
                loss.backward(retain_graph=k < len(losses) - 1)
        else:
            torch.stack(losses).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append(sum(loss.item() for loss in losses))
    return history
