"""Groups: the modules of a model that a plan may cut or leave whole as one decision, and the choices that
there are for each: what a search goes over.

A group is a look-up of ids, the place of a region (all layers' attention blocks, feed-forwards, experts),
or the head. Which there are is the planner's to say: what it can't cut over so many ranks is no group."""

from shardwise.core.errors import PlanError
from shardwise.core.layer_name import any_layer
from shardwise.core.mesh import Mesh
from shardwise.core.plan import StyleName
from shardwise.core.search import CUT, LOOK_UPS, SEQUENCE, WHOLE, Group, gives_parts_alone
from shardwise.models.source import ModelSource
from shardwise.planner.make import Forward, Wish, traced_model
from shardwise.planner.regions import place_of


def groups_of(source: ModelSource, mesh: Mesh, seq: int, forward: Forward | None = None) -> tuple[Group, ...]:
    """Of a model over a mesh's tp ranks; the first option of each is the default. Empty where there is one
    rank, or nothing can be cut. forward: as make_plan takes it. Raises ModelError where it can't be
    traced."""
    if mesh.tp == 1:
        return ()
    making = traced_model(source, Wish(mesh, seq=seq), lambda _: None, forward).making
    try:
        cuts, _ = making.cuts()
    except PlanError:
        return ()
    found: list[Group] = []
    is_cut, why = cuts.sequence is not None, making.why_not or "its model doesn't allow it"
    found.append(Group(SEQUENCE, (), (CUT, WHOLE) if is_cut else (WHOLE,), () if is_cut else ((CUT, why),)))
    if cuts.table:
        is_part = cuts.sequence is not None and cuts.sequence.is_at_embedding
        closed = [table for table in LOOK_UPS if not is_part and gives_parts_alone(table)]
        options = tuple(str(table) for table in LOOK_UPS if table not in closed)
        reasons = tuple((str(table), "what follows needs whole sequences of it") for table in closed)
        found.append(Group(any_layer(cuts.table[0]), cuts.table[:1], options, reasons))
    for place in dict.fromkeys(map(place_of, cuts.regions)):
        found.append(Group(place, (place,), (CUT, WHOLE)))
    if cuts.head is not None:
        found.append(Group(any_layer(cuts.head), (cuts.head,), (CUT, WHOLE)))
    return tuple(found)


def wish_of(mesh: Mesh, seq: int, styles: dict[str, str]) -> Wish:
    """What a plan with these styles is asked for."""
    tables = {str(style): style for style in LOOK_UPS}
    table = next((tables[option] for option in styles.values() if option in tables), StyleName.ROWWISE)
    whole = frozenset(group for group, option in styles.items() if option == WHOLE and group != SEQUENCE)
    return Wish(mesh, styles.get(SEQUENCE, CUT) == CUT, table, seq, whole)
