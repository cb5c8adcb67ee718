"""The model, plan and data of the recipes that test_trainers.py runs, and what one process makes of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PLAN = """
[rules]
"words" = { style = "rowwise", output = "replicate" }
"norm" = "replicate"
"up" = "colwise"
"down" = "rowwise"
"head" = { style = "colwise", output = "shard(-1)" }
"""
STEPS, MAX_NORM = 4, 0.5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(64, 16), nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 64, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.words(ids_BS)
        logits: Tensor = self.head(x + self.down(torch.relu(self.up(self.norm(x)))))
        return logits


def built() -> Model:
    torch.manual_seed(0)
    return Model()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(64, (4, 9), generator=generator) for _ in range(STEPS)]
    return [(each[:, :-1], each[:, 1:]) for each in ids]


def losses_of_one_process() -> list[float]:
    model = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for ids, labels in batches():
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses
