"""The proof of a plan that a search found: its small twin, on as many ranks of this machine as show every
axis."""

import tempfile
from dataclasses import replace
from pathlib import Path

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import InputError, RunError
from shardwise.core.mesh import AXES, Mesh, Role
from shardwise.core.plan import TheirPlan
from shardwise.core.search import Found
from shardwise.verbs.progress import Progress

MOST_RANKS = 8
PROOF_STOPPED = "its proof was stopped by Ctrl-C"
# those that show most come first, where there are more axes than ranks
_FIRST = (
    Role.CUTS_TENSORS,
    Role.CUTS_EXPERTS,
    Role.SHARDS_PARAMETERS,
    Role.CUTS_SEQUENCE,
    Role.CUTS_DEPTH,
    Role.REPLICATES,
)


def proof_mesh(mesh: Mesh) -> Mesh:
    """Two ranks along each axis that has several, as long as there are no more than MOST_RANKS."""
    sizes: dict[Role, int] = {}
    for role in _FIRST:
        if mesh.size_of(role) > 1 and 2 ** (len(sizes) + 1) <= MOST_RANKS:
            sizes[role] = 2
    return Mesh.of({axis.role: sizes[axis.role] for axis in AXES if axis.role in sizes})


def proved(case: Case, found: Found, plan: str | None, progress: Progress) -> Found:
    """With verify's answer. plan: the text of the same decisions for proof_mesh()'s ranks; None where no
    rules cut."""
    from shardwise.verbs.verify import VerifyOptions, verify

    mesh = proof_mesh(found.candidate.mesh)
    if mesh.world_size == 1:
        return replace(found, why_unproved="one device holds the whole model: there is nothing to prove")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        if plan is not None:
            path.write_text(plan, encoding="utf-8")
        name = str(path) if plan is not None else str(TheirPlan.UNSHARDED)
        asked = replace(case, mesh=mesh, plans=(name,), step=_step(found.settings, mesh))
        try:
            run = verify(asked, VerifyOptions(), progress)
        except (InputError, RunError) as error:
            return replace(found, why_unproved=str(error).replace(name, "the plan"))
    return replace(found, proof=run.verifications[0], proof_mesh=str(mesh), why_unproved=None)


def _step(settings: StepSettings, mesh: Mesh) -> StepSettings:
    """What of a step the proof runs: how it is cut, and what FSDP does, over the mesh's ranks."""
    shards = bool(mesh.shard_axes)
    chunks = settings.chunks if mesh.stages > 1 else 1
    return replace(
        settings,
        accumulation=mesh.stages,
        chunks=chunks,
        schedule=None if chunks == 1 else settings.schedule,
        recompute_layers=1 if settings.recompute_layers is not None else None,
        reshard_after_forward=settings.reshard_after_forward or not shards,
        reduce_once=settings.reduce_once and shards,
        param_dtype=settings.param_dtype if shards else None,
        reduce_dtype=settings.reduce_dtype if shards else None,
        expert_load=1.0,
    )
