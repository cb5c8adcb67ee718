"""Which rule says how each parameter is held, and whether it can be held so; what rules say together: each
parameter by one way, tied ones alike, none forgotten."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from shardwise.core.errors import PlanError
from shardwise.core.held import Held, format_pieces, why_not_shared
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import ROOT, Engine, Ownership, suggest
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.embedding import TableSharder
from shardwise.parallel.layers import LinearSharder
from shardwise.parallel.sharder import Assignment, Fit
from shardwise.parallel.styles import STYLES, styles_of
from shardwise.torch_private import buffers_of, parameters_of


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """An assignment, and how it holds a parameter."""

    assignment: Assignment
    held: Held


def claims(assignments: Iterable[Assignment]) -> dict[str, Claim]:
    """By the name of each parameter that an assignment holds. Raises PlanError where two hold it in two
    ways."""
    found: dict[str, Claim] = {}
    for assignment in assignments:
        prefix = f"{assignment.name}." if assignment.name else ""
        for path, held in assignment.held.items():
            claim = found.setdefault(prefix + path, Claim(assignment, held))
            if claim.held != held:
                raise PlanError(
                    f"rule {claim.assignment.rule} holds {prefix + path} as {claim.held}, and rule "
                    f"{assignment.rule} as {held}. Say it once, or alike."
                )
    return found


def check_held(assignment: Assignment, fit: Fit) -> None:
    """Raises PlanError for a parameter that isn't there, or that can't be cut as the assignment says."""
    module = assignment.module
    for path, held in assignment.held.items():
        where = f"rule {assignment.rule}: parameters names {path} of {assignment.shown}"
        module_name, _, name = path.rpartition(".")
        owner = _submodule(module, module_name)
        if owner is None or (name not in parameters_of(owner) and name not in buffers_of(owner)):
            known = [name for name, _ in module.named_parameters()]
            raise PlanError(
                f"{where}, a {assignment.kind}, which has no such parameter.{suggest(path, known)} It has: "
                f"{', '.join(known[:6]) or 'none'}{', ...' if len(known) > 6 else ''}."
            )
        tensor = parameters_of(owner).get(name, buffers_of(owner).get(name))
        if tensor is not None and isinstance(held.placement, Shard):
            _check_cut(assignment, path, held, tuple(tensor.shape), fit)


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _check_cut(assignment: Assignment, path: str, held: Held, shape: tuple[int, ...], fit: Fit) -> None:
    where = f"rule {assignment.rule} cuts {path} of {assignment.shown}"
    assert isinstance(held.placement, Shard)
    dim = held.placement.dim
    if not -len(shape) <= dim < len(shape):
        raise PlanError(f"{where} along dim {dim}, and it has shape {list(shape)}. Name one of its dims.")
    size = shape[dim]
    if held.pieces and sum(held.pieces) != size:
        raise PlanError(
            f"{where} in pieces {format_pieces(held.pieces, held.parts)}, which are {sum(held.pieces)} "
            f"together, and dim {dim} has {size}. Give pieces that add up to it."
        )
    why_not = why_not_shared(held.pieces, held.parts, fit.tp)
    if why_not is not None:
        raise PlanError(
            f"{where} in pieces {format_pieces(held.pieces, held.parts)}, and {why_not}. Use a tp "
            "size that fits."
        )
    if fit.fsdp > 1 and 0 in chunk_sizes(size, fit.tp):
        raise PlanError(
            f"{where} and leaves a rank without any ({size} over tp={fit.tp}), which FSDP can't shard "
            f"further. Use tp of at most {size}, or no fsdp axis."
        )


def check_none_forgotten(
    model: nn.Module, held: Mapping[str, Claim], covered: Mapping[str, Assignment]
) -> None:
    """Raises PlanError for a parameter that no rule holds, which would train wrong without a word. covered:
    assignments by their module's name."""
    for name, module in model.named_modules():
        shown, kind, prefix = name or "the model itself", type(module).__name__, f"{name}." if name else ""
        for own, _ in module.named_parameters(recurse=False):
            if prefix + own in held:
                continue
            if name in covered:
                raise PlanError(
                    f"rule {covered[name].rule}: nothing says how {own} of {shown}, a {kind}, is held. Say "
                    f'it: parameters = {{ {own} = "shard(DIM)" }}, or "replicate" where it isn\'t cut.'
                )
            if name and not any(True for _ in module.children()):
                choices = ", ".join(styles_of(module))
                raise PlanError(f'no rule covers {name}, a {kind}. Add one: "{name}" = one of {choices}.')
            raise PlanError(
                f'no rule covers {own} of {shown}, a {kind}. Add one: "{name or ROOT}" = {{ style = "local", '
                f'parameters = {{ {own} = "shard(DIM)" }} }}, or "replicate" where it isn\'t cut.'
            )


def check_ties(ties: Mapping[str, tuple[str, ...]], held: Mapping[str, Claim], engine: Engine) -> None:
    """Raises PlanError where parameters that are one are held in several ways. ties: as tied_parameters()
    gives them."""
    for group in set(ties.values()):
        found = [held[name] for name in group if name in held]
        if not found:
            continue
        names = " and ".join(group)
        if engine is Engine.DTENSOR:
            raise PlanError(
                f'{names} are tied, and PyTorch\'s own styles would untie them. Use engine = "native".'
            )
        owners = list({id(claim.assignment): claim.assignment for claim in found}.values())
        tables = [owner for owner in owners if isinstance(owner.sharder, TableSharder)]
        heads = [owner for owner in owners if owner not in tables]
        is_interleaved = any(table.style.ownership is Ownership.INTERLEAVED for table in tables)
        if len(tables) == 1 and len(heads) == 1 and isinstance(heads[0].sharder, LinearSharder):
            _check_tied_head(heads[0], is_interleaved)
            continue
        first = found[0]
        other = next((claim for claim in found if claim.held != first.held or is_interleaved), None)
        if other is not None and len(owners) > 1:
            if isinstance(other.assignment.module, nn.Linear) and tables and len(owners) == 2:
                _check_tied_head(other.assignment, is_interleaved)
            raise PlanError(
                f"{names} are tied, and rule {first.assignment.rule} holds it as {first.held}, rule "
                f"{other.assignment.rule} as {other.held}. Hold it alike"
                + (', with ownership = "contiguous".' if is_interleaved else ".")
            )


def _check_tied_head(head: Assignment, is_interleaved: bool) -> None:
    """is_interleaved: the rows of the table that it shares."""
    where = f"rule {head.rule}: {head.name} is tied to"
    if not head.sharder.takes_tied_table:
        raise PlanError(f"{where} the embedding. Allowed for a tied head: {_TIED_HEADS}.")
    if is_interleaved and head.sharder.output_of(head.style) == Replicate():
        raise PlanError(
            f"{where} an interleaved table, so its whole logits would be out of order. "
            'Use output = "shard(-1)", or ownership = "contiguous".'
        )
    if is_interleaved and head.module.bias is not None:
        raise PlanError(
            f"{where} an interleaved table, and its bias is not dealt out like that. "
            'Use ownership = "contiguous".'
        )


_TIED_HEADS = ", ".join(
    style
    for style, sharders in STYLES.items()
    if any(sharder.takes_tied_table for sharder in sharders.values())
)
