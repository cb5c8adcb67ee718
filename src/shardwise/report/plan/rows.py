"""What is cut, where it begins and ends, and why the rest isn't, in words; for the terminal and the page
alike. Nothing here knows of either."""

import shlex
from collections.abc import Sequence

from shardwise.core.dims import DimClass, Dims, Member
from shardwise.core.held import Held
from shardwise.core.made_plan import MadePlan
from shardwise.core.placement import Shard

# of a class that can't be cut, how many reasons a reader wants
_MOST_REASONS = 2
_PLURAL = ("heads", "KV heads", "experts", "channels", "positions", "query heads of a KV head")
VOCABULARY = "vocabulary"


def title(made: DimClass) -> str:
    """`heads of model.layers.*.self_attn`."""
    return f"{made.name} of {made.where}" if made.where else made.name


def counted(made: DimClass) -> str:
    """`32 heads`, `inner width of 22,016`."""
    return f"{made.units:,} {made.name}" if made.name in _PLURAL else f"{made.name} of {made.units:,}"


def below(name: str, where: str) -> str:
    """A module's or parameter's name from `where` on, of that itself its last part; a weight by its
    module's."""
    if name == where:
        return name.rpartition(".")[2]
    own = name[len(where) + 1 :] if where and name.startswith(f"{where}.") else name
    return own.removesuffix(".weight") or name.rpartition(".")[2]


def listed(names: Sequence[str]) -> str:
    """`q_proj, k_proj and v_proj`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


def makers(made: DimClass) -> list[str]:
    """The modules that make it and hold a part of it themselves."""
    return _holders(made, made.begins)


def takers(made: DimClass) -> list[str]:
    return _holders(made, made.ends)


def _holders(made: DimClass, modules: Sequence[str]) -> list[str]:
    own = {each.parameter.rpartition(".")[0] for each in made.members}
    return [module for module in modules if module in own]


def why(made: DimClass) -> str:
    """A class in plain English: how it is cut and what that costs, or why it isn't."""
    if made.name == VOCABULARY and made.is_cut:
        return _vocabulary(made)
    if made.is_cut:
        return _cut(made)
    if made.obstacles:
        more = len(made.obstacles) - _MOST_REASONS
        reasons = "; ".join(made.obstacles[:_MOST_REASONS])
        more_said = f"; and {more} more reason{'s' * (more > 1)}" if more > 0 else ""
        needing = f" {_names(made, made.whole_at)} {_verb(made.whole_at, 'need')} all of it."
        return f"It can't be cut: {reasons}{more_said}.{needing if made.whole_at else ''}"
    if made.instead:
        return f"It could be cut; the {made.instead} of the same weights cost fewer sums, so they are."
    return "It could be cut; another cut of the same tensors costs fewer sums."


def _cut(made: DimClass) -> str:
    first, last = makers(made), takers(made)
    if set(first) & set(last):
        return _cut_inside(made)
    it = "them" if made.name in _PLURAL else "it"
    told = []
    if first and last:
        told.append(
            f"{_names(made, first)} {_verb(first, 'make')} {it}, "
            f"{_names(made, last)} {_verb(last, 'take')} {it} back."
        )
    if made.whole_at:
        told.append(
            f"{_names(made, made.whole_at)} {_verb(made.whole_at, 'need')} all of {it}: there the ranks "
            f"gather {it}, and cut {it} again."
        )
    so = [f"{_names(made, first)} {_are(first)} cut by {_way(made, first)} (colwise)"] if first else []
    verb = "" if first else f" {_are(last)} cut"
    so += [f"{_names(made, last)}{verb} by {_way(made, last)} (rowwise)"] if last else []
    ends = _names(made, made.ends)
    sums = f"one sum at the end, of what {ends} gives" if len(made.ends) == 1 else "no sum"
    sums = f"a sum at the end of each of {ends}" if len(made.ends) > 1 else sums
    begin = f"So {' and '.join(so)}" if so else f"A rank's part begins at {_names(made, made.begins)}"
    nothing = "nothing else" if made.whole_at else "nothing"
    told.append(f"{begin}: {nothing} is sent in between, and there is {sums}.")
    if made.name == "KV heads":
        told.append("With each go the query heads that share it.")
    known = (*first, *last, *made.whole_at)
    between = [each for each in made.members if each.parameter.rpartition(".")[0] not in known]
    if between:
        names = list(dict.fromkeys(below(each.parameter, made.where) for each in between))
        told.append(f"{listed(names)} {_verb(names, 'go')} with {it}, each rank with its part.")
    if made.gathers:
        told.append(
            f"Backward, the parts of the gradient are summed at the input of {_names(made, made.gathers)}."
        )
    return " ".join(told)


def _cut_inside(made: DimClass) -> str:
    """Of modules that make a class and take it back by themselves, such as experts in one weight."""
    it, modules = "them" if made.name in _PLURAL else "it", makers(made)
    names, many = _names(made, modules), len(modules) > 1
    own = [each for each in made.members if each.held and not each.parameter.endswith(".bias")]
    cut = listed([f"{below(each.parameter, made.where)} by {_dim(each)}" for each in own])
    where = _names(made, made.gathers)
    return (
        f"{names} {_verb(modules, 'make')} {it} and {_verb(modules, 'take')} {it} back by "
        f"{'themselves' if many else 'itself'}: {cut}. Nothing is sent inside; what {names} "
        f"{_verb(modules, 'give')} is summed. Backward, the parts of the gradient are summed at the input of "
        f"{where}."
    )


def _vocabulary(made: DimClass) -> str:
    told = []
    for each in made.members:
        table = below(each.parameter, made.where)
        if each.parameter.rpartition(".")[0] not in made.begins:
            continue
        if each.held:
            told.append(f"Each rank has its rows of {table}; what the look-ups find is put together.")
        else:
            told.append(f"{table} isn't cut by its rows: each rank looks every id up.")
    if made.ends:
        own = {each.parameter.rpartition(".")[0] for each in made.members}
        tied = "" if own.intersection(made.ends) else ", which has the same weight,"
        told.append(
            f"{_names(made, made.ends)}{tied} makes a rank's part of the logits, and the loss is taken of "
            "logits that are cut so."
        )
    return " ".join(told)


def _way(made: DimClass, modules: Sequence[str]) -> str:
    """By which dim of a matrix their weights are cut."""
    own = [
        each
        for each in made.members
        if each.parameter.rpartition(".")[0] in modules and not each.parameter.endswith(".bias")
    ]
    words = list(dict.fromkeys(_dim(each) for each in own))
    return " or ".join(words)


def _dim(member: Member) -> str:
    is_matrix = member.n_dims == 2
    what = ("rows", "columns")[member.dim] if is_matrix else f"dim {member.dim}"
    pieces = Held.parse(member.held).pieces if member.held else ()
    each = f"{'the ' if is_matrix else ''}{what} of each of its {len(pieces)} pieces"
    return each if pieces else what


def _names(made: DimClass, modules: Sequence[str]) -> str:
    return listed([below(each, made.where) for each in modules])


def _verb(subjects: Sequence[str], verb: str) -> str:
    return verb if len(subjects) > 1 else f"{verb}{'es' if verb.endswith('o') else 's'}"


def _are(subjects: Sequence[str]) -> str:
    return "are" if len(subjects) > 1 else "is"


def cut_of(held: str) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """(dim, pieces, into how many parts each is cut where that isn't one for each rank) of a weight that is
    cut; None of one that is whole."""
    how = Held.parse(held)
    match how.placement:
        case Shard(dim):
            return dim, how.pieces, how.parts
    return None


def cut_classes(dims: Dims) -> list[DimClass]:
    return [each for each in dims.classes if each.is_cut]


def sequence(made: MadePlan) -> str:
    """Where activations are cut along the sequence, or why they aren't."""
    if made.sequence is not None:
        return f"The sequence is cut {made.sequence}: between blocks a rank has its part of every sequence."
    return f"The sequence isn't cut: {made.why_not or 'nothing between blocks allows it'}."


def next_command(made: MadePlan) -> str:
    return shlex.join(["shardwise", "verify", "mine.toml", "--model", made.model, "--mesh", made.mesh])
