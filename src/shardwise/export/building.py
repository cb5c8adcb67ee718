"""How a file builds its model: a transformers configuration as data, the user's own factory, or a model that
Shardwise knows."""

from typing import Any

from shardwise.core.errors import PlanError
from shardwise.export.code import Table, dotted, statement, text, value_of
from shardwise.models.factory import FactoryModel
from shardwise.models.model_source import ModelSource

_OF_FILES = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype")


def is_hugging_face(source: ModelSource) -> bool:
    """Whether its model is made of a transformers configuration alone, and gives more than logits."""
    return hasattr(source, "config") and hasattr(getattr(source, "config", None), "to_diff_dict")


def building(source: ModelSource, *, call: str = "parallelize(model, mesh)") -> str:
    """build(mesh=None): the model; given a mesh, sharded by `call`. With it `shardwise verify own` proves the
    file."""
    doc = '    """The model; given a mesh, this rank\'s part of it."""\n'
    end = f"    return model if mesh is None else {call}\n"
    return f"\n\ndef build(mesh: DeviceMesh | None = None) -> nn.Module:\n{doc}{_model(source)}{end}"


def configuration(source: ModelSource) -> str:
    """The constant that a Hugging Face model is built of, where it is one."""
    if not is_hugging_face(source):
        return ""
    values = configured(source)
    return "\n" + statement(
        "CONFIG = ", Table(tuple((key, value_of(each)) for key, each in values.items()), is_open=True)
    )


def configured(source: Any) -> dict[str, Any]:
    """What of a configuration isn't the type's default."""
    values = source.config.to_diff_dict()
    kind = values.pop("model_type")
    kept = {key: each for key, each in sorted(values.items()) if key not in _OF_FILES}
    # a cache of keys is for generation
    return {"model_type": kind, **kept, **({"use_cache": False} if "use_cache" in kept else {})}


def _model(source: ModelSource) -> str:
    if is_hugging_face(source):
        return (
            "    config = AutoConfig.for_model(**CONFIG)\n"
            "    model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())\n"
        )
    if isinstance(source, FactoryModel):
        module, _, path = source.name.partition(":")
        own = path.split(".")[0]
        if own in ("build", "parallelize", "train_step", "main"):
            rest = dotted(path)[len(own) :]
            return f"    from {dotted(module)} import {own} as make\n\n    model = make{rest}()\n"
        return f"    from {dotted(module)} import {own}\n\n    model = {dotted(path)}()\n"
    if not source.name.isprintable():
        raise PlanError("the model's name can't be written as code.")
    named = f"    source = find_model({text(source.name)})\n"
    return (
        "    # a model of Shardwise's own: your model of the same modules takes its place\n"
        "    from shardwise.models.source import find_model\n\n"
        f"{named}"
        "    dtype, device = torch.get_default_dtype(), torch.get_default_device()\n"
        "    model = source.build(dtype=dtype, device=device)\n"
    )
