"""Searches for tests: round numbers; proved and not, verified and not, stopped, without an answer; and names
that would break a page or a terminal."""

from dataclasses import replace

from shardwise.core.case import StepSettings
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Setup, Term
from shardwise.core.search import (
    CUT,
    SEQUENCE,
    WHOLE,
    Candidate,
    Considered,
    Found,
    Group,
    Known,
    Refused,
    Search,
    Space,
    Tipping,
)
from shardwise.core.verification import Proof, Verification
from tests.unit.prediction_example import MACHINE, MEMORY

GIB = 2.0**30
STYLES = (
    ("tok_embeddings", "rowwise"),
    ("attention", CUT),
    ("feed_forward", CUT),
    ("output", CUT),
    (SEQUENCE, CUT),
)
PLAN = """name = "searched"

[rules]
# the vocabulary is cut: each rank looks its own rows up, and the parts are added
"tok_embeddings" = "rowwise"
# heads are cut
"layers.*.attention.wq" = "colwise"
"""
SPACE = Space(
    64,
    (("fsdp", (8, 16, 32, 64)), ("tp", (1, 2, 4, 8))),
    (
        Group("tok_embeddings", ("tok_embeddings",), ("rowwise", "colwise", "routed", "replicated")),
        Group("attention", ("layers.*.attention",), (CUT, WHOLE)),
        Group("feed_forward", ("layers.*.feed_forward",), (CUT, WHOLE)),
        Group("output", ("output",), (CUT,), (("whole", "it has the embedding's weight"),)),
        Group(SEQUENCE, (), (CUT, WHOLE)),
    ),
    (1, 2, 4),
    ("none", "selective-ops", "full"),
    (1,),
    (True, False),
    72 * GIB,
    ("dp=1",),
    ("tok_embeddings=routed",),
)
PROOF = Verification(
    "llama3-70b", "searched", 2, "its small twin",
    proof=Proof("float64", 1e-16, 1e-12, 2e-16, 1e-16, 148, "output.weight", 3e-16, 2, 1e-16, 2e-16),
)  # fmt: skip
WRONG = replace(
    PROOF,
    findings=(
        Finding(FindingKind.GRADIENT_DIFFERS, "output.weight", "it is summed 2 times", 1.0, 2.0, None,
                Cause.SUMMED_TOO_OFTEN),
    ),
)  # fmt: skip


def candidate(
    mesh: str = "fsdp=8,tp=8", micro_batch: int = 1, micro_batches: int = 8, **more: object
) -> Candidate:
    axes = Mesh.parse(mesh).axes
    is_cut = dict(axes).get("tp", 1) > 1
    made = Candidate(axes, STYLES if is_cut else (), micro_batch, micro_batches)
    return replace(made, **more)  # type: ignore[arg-type]


def found(
    made: Candidate,
    step_s: float,
    gib: float = 60.0,
    costs: tuple[tuple[Term, float], ...] = (),
    **more: object,
) -> Found:
    settings = StepSettings(
        64, 4096, dtype="bfloat16", accumulation=made.micro_batches, recompute=made.recompute,
        reshard_after_forward=made.reshard,
    )  # fmt: skip
    terms = tuple((term, step_s * share) for term, share in TERMS.items())
    memory = replace(MEMORY, device_bytes=gib * GIB, capacity_bytes=80e9)
    setup = Setup(made.mesh, made.micro_batches)
    plan = PLAN if made.styles else None
    one = Found(made, plan, settings, setup, 64 * 4096, step_s, step_s * 1.002, terms, memory, costs)
    return replace(one, **more)  # type: ignore[arg-type]


TERMS = {Term.MATMUL: 0.6, Term.KERNELS: 0.2, Term.TENSOR: 0.15, Term.LAUNCH: 0.05}
BEST = found(candidate(recompute="selective-ops", recomputed=20), 10.0, proof=PROOF)
SECOND = found(
    candidate("fsdp=16,tp=4", 2, 2), 10.2, 66, ((Term.DATA, 0.5), (Term.TENSOR, -0.3)),
    is_tie=True, why_unproved="only the best one is verified; --verify-all verifies each",
)  # fmt: skip
THIRD = found(
    candidate("fsdp=64", 1, 1, recompute="full", recomputed=80, reshard=False),
    12.0, 71, ((Term.KERNELS, 1.5), (Term.DATA, 0.5)), why_unproved="no rule cuts anything",
)  # fmt: skip


def considered(*more: Considered) -> tuple[Considered, ...]:
    """The found ones, some from pieces, some by bounds, and some that are too large."""
    own = [Considered(each.candidate, each.step_s, each.memory.device_bytes, Known.PREDICTED, True)
           for each in (BEST, SECOND, THIRD)]  # fmt: skip
    for index in range(12):
        share = 1 + index / 8
        own.append(Considered(candidate(micro_batch=2), 10.5 * share, 50 * GIB / share, Known.COMPOSED, True))
        own.append(
            Considered(candidate("fsdp=32,tp=2", 4, 1), 9 * share, 75 * GIB * share, Known.COMPOSED, False)
        )
        n_bytes = 40 * GIB if index % 2 else float("nan")
        own.append(Considered(candidate("fsdp=32,tp=2"), 13.0 * share, n_bytes, Known.BOUND, True))
    return (*own, *more)


def search(**more: object) -> Search:
    """Proved and verified."""
    settings = StepSettings(64, 4096, dtype="bfloat16")
    made = Search(
        "llama3-70b", replace(MACHINE, name="h100-sxm-80gb"), SPACE, settings, (BEST, SECOND, THIRD),
        considered(),
        (Refused("tp=8 doesn't divide 4 KV heads of layers.*.attention", 96),
         Refused("more than 72 GiB of a device", 1204)),
        (Tipping("links within, rate", 0.62, 1), Tipping("memory, rate", None),
         Tipping("launches, forward", 3.1, 2)),
        0.0, 0.04, 12_345, 31, 412, 96,
        (("traces", 6.1), ("bounds and pieces", 2.4), ("the proof", 3.5)),
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


def with_gap() -> Search:
    """Nothing of it verified, and something might be faster."""
    unproved = replace(BEST, proof=None, why_unproved="--no-verify")
    return search(found=(unproved, SECOND, THIRD), gap=0.032, error=None, tippings=())


def stopped() -> Search:
    return search(gap=0.11, stopped="Ctrl-C after 12 s", found=(replace(BEST, proof=None),), tippings=())


def wrong() -> Search:
    """Its proof says that the plan trains the wrong model."""
    return search(found=(replace(BEST, proof=WRONG), SECOND))


def nothing_fits() -> Search:
    too_large = tuple(
        Considered(candidate("fsdp=32,tp=2", 4, 1), 9.0 + index, (75 + index) * GIB, Known.COMPOSED, False)
        for index in range(5)
    )
    return search(found=(), considered=too_large, tippings=(), gap=float("inf"))


def nothing_at_all() -> Search:
    return search(found=(), considered=(), tippings=(), candidates=0, predicted=0, composed=0)


def large(points: int = 10_000) -> Search:
    """So many considered ones, spread as searches spread them."""
    more = []
    for index in range(points - 39):
        a, b = index % 97 / 97, index % 89 / 89
        known = (Known.COMPOSED, Known.BOUND, Known.BOUND)[index % 3]
        n_bytes = 30 * GIB * (1 + 9 * a * a)
        step_s = 10.6 * (1 + 20 * b * b * (1.2 - a))
        more.append(
            Considered(candidate(micro_batch=1 + index % 4), step_s, n_bytes, known, n_bytes < 72 * GIB)
        )
    return search(considered=considered(*more))


def hostile(text: str) -> Search:
    """The text wherever a user's file has a say."""
    group = Group(text, (text,), (text, CUT), ((text, text),))
    odd = candidate(styles=((text, text),), recompute=text, recomputed=2, schedule=text)
    one = replace(BEST, candidate=odd, plan=text, proof=None, why_unproved=text)
    return search(
        model=text,
        machine=replace(MACHINE, name=text, about=text),
        space=replace(SPACE, groups=(group,), fixed=(text,), forbidden=(text,)),
        found=(one, replace(one, step_s=11.0, costs=((Term.TENSOR, 1.0),))),
        considered=tuple(replace(each, candidate=odd) for each in considered()),
        refused=(Refused(text, 3),),
        tippings=(Tipping(text, 2.0, 1),),
        seconds=((text, 1.0),),
        stopped=text,
        notes=(text,),
    )
