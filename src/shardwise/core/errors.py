"""The errors a user can meet, as one tree. Each says what, where, actual against allowed, and what to do.

    ShardwiseError
    ├── InputError            the user's input is wrong; exit code 2
    │   ├── MeshError         a mesh that can't be built or used
    │   ├── MachineError      a machine file that doesn't parse, or says what can't be
    │   ├── ModelError        an unknown model, or one that a verb can't take
    │   ├── PlanError         a plan that doesn't parse, match or fit the model
    │   ├── TorchError        a PyTorch that lacks what Shardwise uses
    │   ├── TextError         text or a tokenizer that can't be used
    │   ├── TraceError        a profiler trace that can't be used
    │   ├── CheckpointError   a checkpoint that is damaged, or of another model
    │   └── OptionError       an option, or a combination, that isn't offered
    └── RunError              a rank died, timed out, or the run could not go on; exit code 3
        ├── DriftError        ranks don't hold what they must hold alike
        ├── NotFiniteError    a loss or a gradient that is infinite or no number
        └── StalledError      nothing was heard from any rank for the time that it was given

The low level states the mismatch; the public boundary adds the context once.
"""


class ShardwiseError(Exception):
    """Base of every error that Shardwise raises on purpose."""

    exit_code = 3


class InputError(ShardwiseError):
    """The user's input is wrong."""

    exit_code = 2


class MeshError(InputError):
    """A mesh that can't be built or used."""


class MachineError(InputError):
    """A machine file that doesn't parse, or says what can't be."""


class ModelError(InputError):
    """An unknown model, or one that a verb can't take."""


class PlanError(InputError):
    """A plan that doesn't parse, match or fit the model."""


class TorchError(InputError):
    """A PyTorch that lacks what Shardwise uses."""


class TextError(InputError):
    """Text or a tokenizer that can't be used."""


class TraceError(InputError):
    """A profiler trace, or a set of them, that can't be used."""


class CheckpointError(InputError):
    """A checkpoint that is damaged or of another model, or state that can't be saved."""


class OptionError(InputError):
    """An option, or a combination of options, that isn't offered."""


class RunError(ShardwiseError):
    """A rank died, timed out, or the run could not go on."""


class DriftError(RunError):
    """Ranks don't hold what they must hold alike."""


class NotFiniteError(RunError):
    """A loss or a gradient that is infinite or no number."""


class StalledError(RunError):
    """Nothing was heard from any rank for the time that it was given."""
