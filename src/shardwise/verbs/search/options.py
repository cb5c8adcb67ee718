"""What search alone knows, beside what predict assumes of the run."""

from dataclasses import dataclass
from typing import Annotated

from shardwise.core.option import Option
from shardwise.verbs.predict import PredictOptions
from shardwise.verbs.search.space import Wanted

PANEL = "Search"


@dataclass(frozen=True, slots=True)
class SearchOptions(PredictOptions):
    """What only search knows, beside what predict assumes of the run."""

    devices: Annotated[int | None, Option("To be used, all of them.", PANEL, 1, shown="one node's")] = None
    fix: Annotated[
        tuple[str, ...],
        Option(
            "A decision that is made: tp=8, micro-batch=1,2, recompute=full, chunks=1, reshard=yes, "
            "sequence=cut (or whole), or of modules: tok_embeddings=rowwise. Repeat it for others.",
            PANEL,
            shown="nothing",
        ),
    ] = ()
    forbid: Annotated[
        tuple[str, ...], Option("A decision that isn't to be made: cp=2,4,8.", PANEL, shown="nothing")
    ] = ()
    memory: Annotated[
        float | None, Option("GiB that a device may hold.", PANEL, 0.001, shown="all that the machine has")
    ] = None
    seconds: Annotated[
        float,
        Option("After which the best so far is given, with how much better another could be.", PANEL, 1),
    ] = 60.0
    top: Annotated[int, Option("Plans that are given out.", PANEL, 1, 50)] = 5
    verify: Annotated[
        bool,
        Option(
            "Prove the best plan on its small twin, on ranks of this machine.",
            PANEL,
            flag="--verify/--no-verify",
        ),
    ] = True

    def __post_init__(self) -> None:
        PredictOptions.__post_init__(self)
        Wanted.of(self.fix, self.forbid)
