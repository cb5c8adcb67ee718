"""Names: what the leaves of a forward count, told by where the forward has them and by no module's name."""

from shardwise.dims.factors import Factor, leaves
from shardwise.dims.record import Record

VOCABULARY, HEADS, EXPERTS = "vocabulary", "heads", "experts"
KV_HEADS, QUERY_HEADS = "KV heads", "query heads of a KV head"
HIDDEN, INSIDE = "hidden width", "width of a head"


class Names:
    """What leaves count, from where the forward has them."""

    def __init__(self, record: Record) -> None:
        self._sequence = record.sequence
        self._of: dict[Factor, str] = {}
        self._note_widths(record)
        heads = self._note_heads(record)
        for op in record.ops:
            if "convolution" in op.name:
                self._note(op.inputs[0].dims[1], "channels")
                for window in op.inputs[1].dims[2:]:
                    self._note(window, "window")
            for factor, why in op.blocked:
                if why.startswith("its experts"):
                    self._note(factor, EXPERTS)
        for op in record.ops:
            for value in op.outputs:
                for dim in value.dims:
                    own = list(leaves(dim))
                    if len(own) > 1 and not heads.isdisjoint(own):
                        for leaf in own:
                            self._of.setdefault(leaf, INSIDE)
        for op in record.ops:
            for factor in op.summed:
                self._note(factor, "inner width")

    def of(self, leaf: Factor) -> str:
        """Such as "heads"; what is made and summed over again without any other sign is an "inner width"."""
        return self._of.get(leaf, "width")

    def _note(self, factor: Factor, name: str) -> None:
        for leaf in leaves(factor):
            if leaf not in self._sequence:
                self._of.setdefault(leaf, name)

    def _note_widths(self, record: Record) -> None:
        if record.logits is not None:
            self._note(record.logits.dims[-1], VOCABULARY)
        if record.ids is not None:
            self._note(record.ids.dims[0], "batch")
        for op in record.ops:
            if op.name == "embedding" and not op.inputs[-1].has_gradient:
                rows, width = op.inputs[0].dims
                self._note(rows, VOCABULARY if op.inputs[-1].is_live else "positions")
                self._note(width, HIDDEN)

    def _note_heads(self, record: Record) -> set[Factor]:
        """Heads are what is beside a sequence that looks at a sequence: [.., heads, S, S]."""
        found: set[Factor] = set()
        for op in record.ops:
            for value in op.outputs:
                if not value.is_live or not value.has_gradient:
                    continue
                long = [dim for dim in value.dims if not self._sequence.isdisjoint(leaves(dim))]
                if len(long) > 1:
                    own = {leaf for dim in value.dims if dim not in long for leaf in leaves(dim)}
                    found |= {leaf for leaf in own if self._of.get(leaf, HEADS) == HEADS}
        for leaf in found:
            self._of[leaf] = HEADS
        return found
