"""A plan in PyTorch's own styles (torch.distributed.tensor.parallel): which of them says what a rule says,
and what none of them can.

What a style does to a module of which every rank has all, PyTorch has no style for: WHOLE is a small class
that goes into the file. q and k norms on heads that are cut are SequenceParallel over the dim of the heads,
as torchtitan had them in 2025: each rank's gradient is a part, and DTensor sums it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from shardwise.core.export import LeftOut
from shardwise.core.held import count_of
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import Style, StyleName
from shardwise.export.code import Call, Code, Raw, Row, Table, call, checked_name
from shardwise.export.job import Called, Job
from shardwise.export.nearest import Unsaid, nearest
from shardwise.parallel.resolve import head_of
from shardwise.parallel.sharder import Assignment

HEADS_DIM = -2
"""Of what norms of heads take: heads before their width."""
_CONTAINERS = (StyleName.GATHER_INPUT, StyleName.SPLIT_INPUT, StyleName.LOCAL)
_CUT = (StyleName.COLWISE, StyleName.ROWWISE)


@dataclass(frozen=True, slots=True)
class TorchStyles:
    """table: for parallelize_module, by pattern. counts: (module's pattern, attribute) of integers that count
    what is cut. cut_logits: the head leaves them cut by vocabulary, for loss_parallel. job: under the plan
    that is said."""

    job: Job
    table: Table
    counts: tuple[tuple[str, str], ...]
    cut_logits: bool
    left_out: tuple[LeftOut, ...]


def torch_styles(job: Job, form: str, *, can_count: bool = True) -> TorchStyles:
    """The nearest plan that PyTorch's styles can say, written in them. can_count: whether the file may also
    change a module's counts. Raises PlanError."""
    head = head_of(job.model)
    job, left_out = nearest(
        job, form, lambda each: _unsaid(each, job.mesh.tp, is_head=each.module is head, can_count=can_count)
    )
    containers = {each.name for each in job.assignments if not _is_leaf(each)}
    called = job.called(containers)
    by_module: dict[str, Code] = {}
    for each in job.assignments:
        said = _said(each, called.get(each.name) or _by_signature(each.module), is_head=each.module is head)
        if said is not None:
            by_module[checked_name(each.name)] = said
        if each.style.name is StyleName.WHOLE:
            for below in each.below:
                inside = call(_on_all(each.module.get_submodule(below)))
                by_module[checked_name(f"{each.name}.{below}")] = inside
    by_pattern = job.patterns(by_module)
    counts = _counts(job)
    return TorchStyles(
        job,
        Table(tuple(by_pattern.items()), tuple(_comments(job, by_pattern)), is_open=True),
        counts,
        any(each.module is head and _keeps_cut(each) for each in job.assignments),
        left_out,
    )


def _unsaid(assignment: Assignment, tp: int, *, is_head: bool, can_count: bool) -> Unsaid | None:
    """What PyTorch's styles can't say of a rule, if anything."""
    style, name, module = assignment.style, assignment.style.name, assignment.module
    if style.divide and not can_count:
        return Unsaid("counts of what is cut can't be changed beside the styles")
    if name is StyleName.ROUTED:
        as_before = assignment.sharder.output_of(style)
        return Unsaid(
            "PyTorch's own styles send no rows to the ranks that need them",
            Style(StyleName.ROWWISE, output=as_before),
        )
    if name is StyleName.EXPERTS:
        return Unsaid("PyTorch's own styles share no experts out")
    if style.pieces or any(count_of(each)[1] for each in style.divide):
        return Unsaid("PyTorch's own styles cut what lies in several pieces as if it were one")
    given = [key for key in ("parameters", "cut", "every_input") if getattr(style, key)]
    if given:
        return Unsaid(f"PyTorch's own styles take no {given[0]}")
    if name is StyleName.ROWWISE and style.gradient is not None:
        return Unsaid("PyTorch's own styles sum no gradient of what a rowwise module gives")
    if name is StyleName.GATHER_INPUT and style.output is not None:
        return Unsaid("PyTorch's own styles sum nothing that a module with others inside gives")
    gathers = name is StyleName.COLWISE and assignment.sharder.output_of(style) == Replicate()
    if gathers and assignment.is_input_whole:
        return Unsaid("PyTorch's own styles don't sum the gradient of what a colwise module gathers")
    if name in _CUT:
        return _uncut(assignment, tp, is_head=is_head)
    same = name is StyleName.WHOLE or (name is StyleName.REPLICATE and style.gradient is None)
    if not same and _is_leaf(assignment) and _is_unlike(module):
        return Unsaid(f"its forward may do with its weights what DTensors can't: it is {_a(module)}")
    return None


def _uncut(assignment: Assignment, tp: int, *, is_head: bool) -> Unsaid | None:
    """Of what PyTorch's styles cut: linear layers and tables, in equal parts."""
    module, dim = assignment.module, assignment.sharder.cut_dim
    if dim is None or not isinstance(module, nn.Linear | nn.Embedding):
        return Unsaid(f"PyTorch's own styles cut Linear and Embedding, and this is {_a(module)}")
    size = module.weight.shape[dim]
    if size % tp and not (is_head or isinstance(module, nn.Embedding)):
        return Unsaid(f"PyTorch's own styles need equal parts, and tp={tp} doesn't divide {size}")
    return None


def _is_unlike(module: nn.Module) -> bool:
    """Whether a module's forward may do with its weights what DTensor doesn't carry through, as it does what
    norms do."""
    has_matrix = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    return has_matrix and not isinstance(module, nn.Linear | nn.Embedding)


def _on_all(module: nn.Module) -> str:
    """The class that has all ranks run the same with it."""
    return "Plain" if _is_unlike(module) else "Whole"


def _a(module: nn.Module) -> str:
    name = type(module).__name__
    return f"a{'n' if name[0] in 'AEIO' else ''} {name}"


def _is_leaf(assignment: Assignment) -> bool:
    """Whether it is a module that works itself, and not one that only holds others."""
    is_whole_block = assignment.style.name is StyleName.WHOLE and bool(assignment.below)
    return assignment.style.name not in _CONTAINERS and not is_whole_block


def _said(assignment: Assignment, called: Called, *, is_head: bool) -> Code | None:
    """A rule in PyTorch's style; None where nothing needs to be done."""
    style, sharder = assignment.style, assignment.sharder
    match style.name:
        case StyleName.COLWISE:
            keeps = True if is_head and _keeps_cut(assignment) else None
            before, after = (
                (Replicate(), sharder.output_of(style))
                if isinstance(assignment.module, nn.Embedding)
                else (sharder.input_of(style), sharder.output_of(style))
            )
            return call(
                "ColwiseParallel",
                input_layouts=_but(before, Replicate()),
                output_layouts=_but(after, Shard(-1)),
                use_local_output=Raw("False") if keeps else None,
            )
        case StyleName.ROWWISE:
            is_table = isinstance(assignment.module, nn.Embedding)
            before = Replicate() if is_table else sharder.input_of(style)
            return call(
                "RowwiseParallel",
                input_layouts=_but(before, Shard(-1)),
                output_layouts=_but(sharder.output_of(style), Replicate()),
            )
        case StyleName.SEQUENCE_PARALLEL:
            return call("SequenceParallel", use_local_output=Raw("True"))
        case StyleName.REPLICATE if style.gradient == Partial():
            return call("SequenceParallel", sequence_dim=Raw(str(HEADS_DIM)), use_local_output=Raw("True"))
        case StyleName.REPLICATE:
            return call(_on_all(assignment.module))
        case StyleName.REPLICATED:
            after = sharder.output_of(style)
            return call("Whole", used=_placement(after) if after == Shard(1) else None)
        case StyleName.GATHER_INPUT:
            return _prepared("PrepareModuleInput", called, sharder.input_of(style), Replicate())
        case StyleName.SPLIT_INPUT:
            return _prepared("PrepareModuleInput", called, Replicate(), Shard(1), use_local_output="True")
        case StyleName.WHOLE:
            return _whole(assignment, called)
    return None


def _whole(assignment: Assignment, called: Called) -> Code | None:
    style, sharder = assignment.style, assignment.sharder
    before, after = sharder.input_of(style), sharder.output_of(style)
    if _is_leaf(assignment):
        given, gives = _but(before, Replicate()), _but(after, Replicate())
        if _is_unlike(assignment.module):
            return call("Plain", given=given, gives=gives)
        return call("Whole", given=given, used=_placement(Replicate()) if given else None, gives=gives)
    if before == after == Replicate():
        return None
    none = (Raw("None"),) * (called.gives - 1)
    outputs: list[Code] = [_placement(Replicate()), _placement(after)]
    if called.gives:
        outputs = [Row((each, *none)) for each in outputs]
    made = _prepared("PrepareModuleInputOutput", called, before, Replicate(), use_local_input="True")
    return Call(
        made.name, (), (*made.named, ("output_layouts", outputs[0]), ("desired_output_layouts", outputs[1]))
    )


def _prepared(name: str, called: Called, before: Placement, wanted: Placement, **more: str) -> Call:
    """The first tensor that a module is given, from one placement to another."""
    others = {key: Raw(value) for key, value in more.items()}
    if called.keyword is not None:
        by_name = [Table(((called.keyword, _placement(each)),)) for each in (before, wanted)]
        return call(name, input_kwarg_layouts=by_name[0], desired_input_kwarg_layouts=by_name[1], **others)
    none = (Raw("None"),) * (called.places - 1)
    by_place = [Row((_placement(each), *none)) if none else _placement(each) for each in (before, wanted)]
    return call(name, input_layouts=by_place[0], desired_input_layouts=by_place[1], **others)


def _by_signature(module: nn.Module) -> Called:
    """Where no forward told: all that its own forward must be given, by place."""
    import inspect

    own = inspect.signature(module.forward).parameters.values()
    return Called(sum(each.default is each.empty for each in own) or 1)


def _keeps_cut(assignment: Assignment) -> bool:
    is_colwise = assignment.style.name is StyleName.COLWISE
    return is_colwise and assignment.sharder.output_of(assignment.style) == Shard(-1)


def _placement(placement: Placement) -> Raw:
    return Raw(f"{type(placement).__name__}({placement.dim if isinstance(placement, Shard) else ''})")


def _but(placement: Placement, default: Placement) -> Raw | None:
    return None if placement == default else _placement(placement)


def _counts(job: Job) -> tuple[tuple[str, str], ...]:
    """Each integer that counts what is cut, once: (its module, its own name), by pattern."""
    found: dict[str, dict[str, None]] = {}
    for each in job.assignments:
        for entry in each.style.divide:
            holder, _, own = count_of(entry)[0].rpartition(".")
            path = ".".join(part for part in (each.name, holder) if part)
            found.setdefault(checked_name(path), {})[checked_name(own)] = None
    by_pattern = job.patterns({path: tuple(names) for path, names in found.items()})
    return tuple((pattern, own) for pattern, names in by_pattern.items() for own in names)


def _comments(job: Job, by_pattern: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What isn't obvious of the styles, where it is first met."""
    told: set[str] = set()
    names = {each.name: each for each in job.assignments}
    patterns = job.patterns({name: each.style for name, each in names.items()})
    for pattern in by_pattern:
        style = patterns.get(pattern) or getattr(names.get(pattern), "style", None)
        said = _COMMENTS.get(style.name) if style is not None else None
        if style is not None and style.name is StyleName.GATHER_INPUT and style.input == Replicate():
            said = "the gradient of its input is summed once for all that it holds"
        if style is not None and style.name is StyleName.REPLICATE and style.gradient is not None:
            said = "on a rank's own heads (dim -2): its gradient is a part, which DTensor sums"
        if said is not None and said not in told:
            told.add(said)
            yield pattern, said


_COMMENTS = {
    StyleName.SEQUENCE_PARALLEL: "each rank norms its own part of the sequence",
    StyleName.GATHER_INPUT: "its input is gathered once for all that it holds, its gradient scattered once",
    StyleName.SPLIT_INPUT: "what stands before asks how long sequences are: they are cut here",
    StyleName.WHOLE: "whole on every rank, which computes all of it",
}
