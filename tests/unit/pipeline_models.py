"""Models that no pipeline can run, each for a reason of its own."""

import torch
from torch import Tensor, nn

WIDTH, VOCABULARY = 8, 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, *others: Tensor) -> Tensor:
        return hidden + sum((torch.tanh(other) for other in others), self.up(hidden))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def without_layers() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY))


def shared_layer() -> nn.Module:
    model = Model()
    model.layers[3] = model.layers[0]
    return model


class TwoStreams(Model):
    def forward(self, ids: Tensor) -> Tensor:
        hidden = first = self.table(ids)
        for layer in self.layers:
            hidden = layer(hidden, first)
        logits: Tensor = self.head(hidden)
        return logits


def two_streams() -> nn.Module:
    return TwoStreams()


class Beside(Model):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def parameter_beside_layers() -> nn.Module:
    return Beside()


class TableInLayers(Model):
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = layer(hidden) + self.table(ids)
        logits: Tensor = self.head(hidden)
        return logits


def table_in_layers() -> nn.Module:
    return TableInLayers()


class ChangedBetween(Model):
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = 2 * layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def changed_between() -> nn.Module:
    return ChangedBetween()
