"""MadePlan and Dims -> tables and words: what is cut and where, what stays whole and why, and what to do
next."""

from collections.abc import Iterator, Sequence

from shardwise.core.dims import DimClass, Dims, Weight
from shardwise.core.layer_name import any_layer
from shardwise.core.made_plan import CutAlone, LeftWhole, MadePlan
from shardwise.report.common.plain import name, sentence
from shardwise.report.common.table import Block, Column, Columns, Line, Report, Table, Tone, Words, tabled
from shardwise.report.common.units import COUNT, NUMBER, Format, format_count, format_share
from shardwise.report.plan import rows

# rows of a terminal's tables; a page and the files have all
_FEW = 8
_UNITS = Format(lambda n: f"{n:,}")
_SHARE = Format(format_share, "share")


def plan_report(made: MadePlan) -> Report:
    title = f"A plan for {name(made.model)} on {made.mesh}"
    more = tuple(notes(made))
    blocks: list[Block] = [
        Words(headline(made), title, boxed=True),
        cut_table(made.dims),
        *([alone_table(made)] if made.alone else []),
        whole_table(made),
        *([Words(more)] if more else []),
        Words(
            (
                Line("shardwise plan ... --toml > mine.toml", lead="Write it:"),
                Line(rows.next_command(made), lead="Prove it:"),
            )
        ),
    ]
    return Report(title, tuple(blocks), (rules_table(made),))


def headline(made: MadePlan) -> tuple[Line, ...]:
    """How much is cut, and whether the sequence is."""
    share, of = format_share(made.sharded), f"{format_count(made.parameters)} parameters"
    return (
        Line(f"{share} of {of} are cut over {made.dims.ranks} ranks.", Tone.STRONG),
        Line(sentence(rows.sequence(made))),
    )


def notes(made: MadePlan) -> Iterator[Line]:
    """What else there is to know."""
    yield from (Line(sentence(note)) for note in made.notes)
    if made.dims.unknown:
        yield Line(
            f"Nobody described what these ops do, so their dims stay whole: {', '.join(made.dims.unknown)}.",
            Tone.CAUTION,
        )


def cut_table(dims: Dims) -> Table:
    """What is cut: how many units over the ranks, from where to where."""
    columns: Columns[DimClass] = (
        (Column("What is cut", wraps=True), lambda each: name(rows.title(each))),
        (Column("units", _UNITS), lambda each: each.units),
        (Column("each", _UNITS), lambda each: each.width),
        (Column("layers", NUMBER), lambda each: each.times),
        (Column("begins at", wraps=True, spills=True), lambda each: _modules(each, each.begins)),
        (Column("ends at", wraps=True, spills=True), lambda each: _modules(each, each.ends)),
        (Column("parameters", wraps=True, spills=True), _parameters),
    )
    return tabled(rows.cut_classes(dims), columns, key="cut", title="What is cut")


def _modules(made: DimClass, modules: Sequence[str]) -> str:
    return ", ".join(rows.below(each, made.where) for each in modules)


def _parameters(made: DimClass) -> str:
    held = (each for each in made.members if each.held)
    return ", ".join(f"{rows.below(each.parameter, made.where)} {each.held}" for each in held)


def alone_table(made: MadePlan) -> Table:
    """What is cut by itself, with what it gives gathered at once."""
    columns: Columns[CutAlone] = (
        (Column("What is cut alone", wraps=True), lambda each: name(each.pattern)),
        (Column("parameters", COUNT, sums=True), lambda each: each.elements),
        (Column("of all", _SHARE, sums=True), lambda each: each.elements / made.parameters),
        (Column("why", wraps=True, spills=True), lambda each: sentence(each.reason)),
    )
    title = "What is cut alone, and gathered at once"
    return tabled(made.alone, columns, key="alone", title=title, short=_FEW)


def whole_table(made: MadePlan) -> Table:
    """What every rank holds whole, the largest first."""
    columns: Columns[LeftWhole] = (
        (Column("What stays whole", wraps=True), lambda each: name(each.pattern)),
        (Column("parameters", COUNT, sums=True), lambda each: each.elements),
        (Column("of all", _SHARE, sums=True), lambda each: each.elements / made.parameters),
        (Column("why", wraps=True, spills=True), lambda each: sentence(each.reason)),
    )
    return tabled(made.whole, columns, key="whole", title="What every rank holds whole", short=_FEW)


def rules_table(made: MadePlan) -> Table:
    """The plan's rules with their reasons."""
    rules = made.plan.rules
    columns: Columns[int] = (
        (Column("module", wraps=True), lambda at: name(rules[at].pattern)),
        (Column("style", wraps=True), lambda at: str(rules[at].style)),
        (Column("why", wraps=True), lambda at: sentence(made.comments.get(rules[at].pattern, ""))),
    )
    return tabled(range(len(rules)), columns, key="rules", title="The plan's rules")


def dims_report(dims: Dims) -> Report:
    """Each class that is cut in words; then those that aren't, and each weight with its dims."""
    cut = rows.cut_classes(dims)
    blocks: list[Block] = [_dims_headline(dims)]
    for each in cut:
        times = f", in {each.times} layers" if each.times > 1 else ""
        where = f" in {each.where}" if each.where else ""
        titled = f"{rows.counted(each)}{where}{times}"
        blocks.append(Words((Line(sentence(rows.why(each))),), name(titled)))
    blocks.append(others_table(dims))
    if dims.plan is not None:
        blocks.append(weights_table(dims))
    appendix = () if dims.plan is not None else (weights_table(dims),)
    return Report(f"The dims of {name(dims.model)}", tuple(blocks), appendix)


def _dims_headline(dims: Dims) -> Words:
    layers = f" {any_layer(dims.layers[0])} stands for {dims.layers[1]} layers." if dims.layers else ""
    return Words(
        (
            Line(
                f"Which dims of its weights must be cut together, over {dims.ranks} ranks; read off its "
                f"forward.{layers}"
            ),
        ),
        f"The dims of {name(dims.model)}",
        boxed=True,
    )


def others_table(dims: Dims) -> Table:
    """Classes that aren't cut, the largest first."""
    columns: Columns[DimClass] = (
        (Column("What isn't cut", wraps=True), lambda each: name(rows.title(each))),
        (Column("units", _UNITS), lambda each: each.units),
        (Column("layers", NUMBER), lambda each: each.times),
        (Column("why", wraps=True, spills=True), lambda each: sentence(rows.why(each))),
    )
    others = [each for each in dims.classes if not each.is_cut]
    return tabled(others, columns, key="others", title="What isn't cut, and why", short=_FEW)


def weights_table(dims: Dims) -> Table:
    """Every weight in the order of the forward."""
    columns: Columns[Weight] = (
        (Column("weight", wraps=True), lambda each: name(each.name)),
        (Column(name(dims.plan or "the plan")), lambda each: each.rule),
        (Column("a made plan has it"), lambda each: each.held),
        (Column("shape", spills=True), lambda each: " x ".join(map(str, each.shape))),
        (Column("times", NUMBER), lambda each: each.times),
        (Column("dims", wraps=True, spills=True), lambda each: _dims_of(dims, each)),
    )
    return tabled(dims.weights, columns, key="weights", title="Weights, in the order of the forward")


def _dims_of(dims: Dims, weight: Weight) -> str:
    named = (" x ".join(dims.classes[at].name for at in own) or "its own" for own in weight.classes)
    return " | ".join(named)
