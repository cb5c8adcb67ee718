"""Starts the ranks that prove plans right or wrong, and starts them again where one claim took them down. All
claims share a launch: it costs seconds."""

from collections.abc import Callable, Sequence

import msgspec

from shardwise.core.case import StepSettings
from shardwise.core.errors import RunError, StalledError
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verification
from shardwise.launch import is_main, joined, run_ranks
from shardwise.verify.claim import Claim
from shardwise.verify.examine import Answer, Job
from shardwise.verify.without_ranks import informed

SETTINGS = StepSettings(batch=2, seq=16)
TIMEOUT_S = 120.0


def verify(
    claims: Sequence[Claim],
    *,
    mesh: Mesh,
    device_type: str = "cpu",
    settings: StepSettings = SETTINGS,
    also_smallest: bool = False,
    timeout_s: float = TIMEOUT_S,
    on_answer: Callable[[Verification], None] = lambda _: None,
) -> tuple[Verification, ...]:
    """A Verification for each claim, in order; under torchrun on rank 0 only, () elsewhere. on_answer: told
    each as it comes, without what a trace adds to one that isn't right. settings: batch and seq, a multiple
    of tp. also_smallest: a batch is compared too in which every micro-batch has one sequence.

    timeout_s: without a sign of life, a claim is given up, and is said to have timed out. Raises the
    InputErrors of the model and plan; RunError for a claim that takes torchrun's ranks down, which can't be
    started anew from here.
    """
    answers: dict[int, Verification] = {}

    def take(event: bytes) -> None:
        answer = msgspec.msgpack.decode(event, type=Answer)
        known = answers.get(answer.number)
        if known is None or (answer.alone and answer.verification.findings and not known.findings):
            answers[answer.number] = answer.verification
            on_answer(answer.verification)

    while len(answers) < len(claims):
        first = len(answers)
        try:
            run_ranks(
                "shardwise.verify.examine:run",
                msgspec.json.encode(Job(tuple(claims), first, mesh, settings, also_smallest)),
                world_size=mesh.world_size,
                device_type=device_type,
                timeout_s=timeout_s,
                on_event=take,
            )
        except RunError as error:
            if type(error) not in (RunError, StalledError) or joined():
                raise
            if len(answers) == first:  # nobody could say what it was
                claim = claims[first]
                answer = Verification(claim.model, claim.label, mesh.tp, ran_unsharded=False)
                if isinstance(error, StalledError):
                    answers[first] = claim.timed_out(answer, error)
                else:
                    answers[first] = claim.crashed(answer, error)
                on_answer(answers[first])
        if not is_main():
            return ()
    proved = [answers[number] for number in range(len(claims))]
    if joined():  # a trace needs a process that is no rank
        return tuple(proved)
    return tuple(informed(each, claim, settings) for each, claim in zip(proved, claims, strict=True))
