"""What is to be proved, and what an attempt that ended in an error says. Both with ranks (examine.py) and
without (without_ranks.py)."""

from dataclasses import dataclass, replace

from torch import nn

from shardwise.core.errors import InputError, OptionError, ShardwiseError, StalledError
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.core.shown import shown, told
from shardwise.core.verification import Verification
from shardwise.models.source import is_of_many
from shardwise.parallel.any_plan import name_of, plan_from, text_of
from shardwise.parallel.engines.hugging_face import has_plan

NO_PLANS = {
    TheirPlan.HF: "transformers has no tensor-parallel plan for it; shardwise plan makes one",
    TheirPlan.HF_EP: "transformers has no expert-parallel plan for it",
}
TWIN = "its small twin"


def no_plan(model: nn.Module, plan: AnyPlan) -> str | None:
    """Why a plan of transformers' can't be proved on a model: there is none for it; None where there is, and
    for any other plan."""
    if not isinstance(plan, TheirPlan) or plan not in NO_PLANS or has_plan(model, plan):
        return None
    return NO_PLANS[plan]


@dataclass(frozen=True, slots=True)
class Claim:
    """That a plan trains the model it should. plan: TOML, or the name of a plan that isn't ours. twin: None
    takes the small twin where the model is large. dtype: None is float64, then float32. twin_plan: the plan
    as TOML with the twin's sizes, where it names sizes."""

    model: str
    plan: str
    label: str
    twin: bool | None = None
    dtype: str | None = None
    twin_plan: str = ""

    @classmethod
    def of(cls, model: str, plan: AnyPlan, *, twin: bool | None = None, dtype: str | None = None) -> "Claim":
        """plan: also an own plan that isn't in a file."""
        return cls(model, text_of(plan), name_of(plan), twin, dtype)

    @property
    def parsed_plan(self) -> AnyPlan:
        return plan_from(self.plan)

    @property
    def parsed_twin_plan(self) -> AnyPlan:
        """The plan for the small twin."""
        return Plan.from_toml(self.twin_plan) if self.twin_plan else self.parsed_plan

    def __str__(self) -> str:
        return f"{self.model} under {self.label}"

    def unproved(self, answer: Verification, error: Exception) -> Verification:
        """`answer`, where not even the unsharded model could be had. A name that isn't known is the user's to
        see; what becomes of a type of transformers or of a framework, of which there are hundreds, is an
        answer."""
        if isinstance(error, InputError) and not is_of_many(self.model):
            raise error
        return replace(answer, note=shown(error, 300))

    def timed_out(self, answer: Verification, error: StalledError) -> Verification:
        """`answer`, where ranks went silent: a collective that some of them don't come to, or work that takes
        longer."""
        note = shown(error, 500)
        return replace(answer, findings=(Finding(FindingKind.TIMED_OUT, "model", note),), note=note)

    def crashed(self, answer: Verification, error: Exception, module: str = "") -> Verification:
        """`answer`, where the plan, or a step under it, failed in a module. A plan of ours says before it
        starts what it can't do: its InputErrors are the user's to see."""
        if isinstance(error, OptionError) or (
            isinstance(error, InputError) and isinstance(self.parsed_plan, Plan)
        ):
            raise error
        text = shown(error, 300) if isinstance(error, ShardwiseError) else told(error, 300)
        crash = Finding(FindingKind.CRASHES, module or "model", text)
        return replace(answer, findings=(crash, *answer.findings), note=text)
