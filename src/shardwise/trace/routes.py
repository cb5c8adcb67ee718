"""What every rank sends where the batch decides: the routes of all ranks, made from the ids as each of them
makes its own."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from shardwise.core.plan import Ownership
from shardwise.core.program import ByData, Collective, Phase
from shardwise.parallel.apply import applied_to
from shardwise.parallel.issuing import Sends
from shardwise.parallel.ownership import RowOwnership, route


class Routes:
    """ids: of each micro-batch. expert_load: see models/routing.py."""

    def __init__(self, model: nn.Module, ids: list[Tensor], expert_load: float = 1.0) -> None:
        self._model = model
        self._ids = ids
        self._expert_load = expert_load
        self._rows: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._seen: dict[tuple[str, str], int] = {}

    def with_all_ranks(self, collective: Collective, sends: Sends | None = None) -> Collective:
        """The collective, with the bytes that each rank of its axis sends in the same micro-batch. sends: see
        Routed; then the first rank, whose experts are the busiest, takes most, or gives it back."""
        if sends is not None:
            load = self._expert_load
            by_data = ByData(sends.mean, load * sends.mean, 0, float(sends.most), expert_load=load)
            return replace(collective, by_data=by_data)
        module = self._model.get_submodule(collective.module)
        assert isinstance(module, nn.Embedding)
        call = collective.call
        key = (collective.module, call.phase)
        index = self._seen[key] = self._seen.get(key, -1) + 1
        row_bytes = module.embedding_dim * getattr(torch, call.dtype).itemsize
        backward = call.phase == Phase.BACKWARD
        pairs = self._all_ranks(collective.module, module, index % len(self._ids), call.axis_size)
        sent = [pair[backward] * row_bytes for pair in pairs]
        tokens = self._ids[0].numel() // call.axis_size
        rows = -(-module.num_embeddings // call.axis_size)
        bound = tokens if backward else (call.axis_size - 1) * min(tokens, rows)
        largest = max(range(len(sent)), key=lambda rank: sent[rank])
        by_data = ByData(sum(sent) / len(sent), float(sent[largest]), largest, float(bound * row_bytes))
        return replace(collective, by_data=by_data)

    def _all_ranks(self, name: str, module: nn.Embedding, index: int, n_ranks: int) -> list[tuple[int, int]]:
        """(rows that a rank sends to others in the forward, rows that it sends back in the backward), per
        rank."""
        if (name, index) not in self._rows:
            plan = applied_to(self._model).plan
            rule = plan.rule_for(name) if plan is not None else None
            kind = rule.style.ownership if rule is not None else Ownership.CONTIGUOUS
            ownership = RowOwnership(module.num_embeddings, n_ranks, kind)
            routes = [route(self._ids[index], ownership, rank) for rank in range(n_ranks)]
            self._rows[name, index] = [
                (each.rows_sent_to_others(rank), sum(each.receive_splits) - each.receive_splits[rank])
                for rank, each in enumerate(routes)
            ]
        return self._rows[name, index]
