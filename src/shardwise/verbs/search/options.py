"""What search alone knows, beside what predict assumes of the run."""

from dataclasses import dataclass
from typing import Annotated

from shardwise.core.option import Option
from shardwise.export.formats import formats
from shardwise.verbs.predict import PredictOptions
from shardwise.verbs.search.space import Wanted

PANEL = "Search"
TOP = 5


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
    top: Annotated[
        int | None,
        Option(
            "Plans that are given out; with --export they are all verified and exported, and without --top "
            "the best alone.",
            PANEL,
            1,
            50,
            shown=str(TOP),
        ),
    ] = None
    verify: Annotated[
        bool,
        Option(
            "Prove the best plan on its small twin, on ranks of this machine.",
            PANEL,
            flag="--verify/--no-verify",
        ),
    ] = True
    export: Annotated[
        str | None,
        Option(
            f"Write the best plan for a framework: {', '.join(formats())}.",
            PANEL,
            choices=formats(),
            shown="none",
        ),
    ] = None

    def __post_init__(self) -> None:
        PredictOptions.__post_init__(self)
        Wanted.of(self.fix, self.forbid)

    @property
    def given_out(self) -> int:
        """How many plans."""
        return self.top or TOP

    @property
    def recommended(self) -> int:
        """How many of them are verified, and exported if that is asked for."""
        return self.top or 1 if self.export is not None else 1
