"""NeMo Automodel's models, sharded by its tensor-parallel plans: `automodel:TYPE`.

The configuration is a transformers type's, as `hf:TYPE` has it. The class is Automodel's own where its
registry has one, else transformers'; `?force_hf=true`, as Automodel calls it, asks for that. Its recipes
reduce the gradients of what tp ranks hold alike between backward and clipping, and so it is done here.
"""

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

from shardwise.core.mesh import TENSOR_AXIS
from shardwise.models.changes import parse_changes
from shardwise.models.frameworks.framework import Framework, FrameworkModel, Make
from shardwise.models.hugging_face import HuggingFaceModel, find_hugging_face, give_logits
from shardwise.models.self_sharded import SelfSharded, ShardsItself

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_OPTIONS = ("force_hf", "sequence_parallel")


def _find(framework: Framework, asked: str) -> ShardsItself:
    kind, has_query, query = asked.partition("?")
    changes = parse_changes(query, framework.named(asked)) if has_query else {}
    options = {key: bool(changes.pop(key, False)) for key in _OPTIONS}
    others = ",".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    of_type = find_hugging_face(f"hf:{kind}{'?' if others else ''}{others}")

    def make(source: HuggingFaceModel) -> Make:
        return lambda mesh: _made(framework, asked, source, mesh, **options)

    return FrameworkModel(
        framework,
        asked,
        f"{of_type.config.model_type} of NeMo Automodel, sharded by its own plan",
        make(of_type),
        of_type.vocab_size,
        of_type.max_seq,
        lambda tp: make(of_type.small(tp)),
    )


def _made(
    framework: Framework,
    asked: str,
    source: HuggingFaceModel,
    mesh: "DeviceMesh | None",
    *,
    force_hf: bool,
    sequence_parallel: bool,
) -> nn.Module | SelfSharded:
    try:
        from nemo_automodel.components.distributed.parallelizer import (
            _get_parallel_plan,
            _update_attention_head_counts_for_tp,
            validate_tp_mesh,
        )
        from nemo_automodel.components.distributed.tp_replicas import synchronize_tp_replica_gradients
    except Exception as error:
        raise framework.failed(asked, "can't be imported", error) from error
    model = _whole(source, force_hf=force_hf)
    if mesh is None:
        return model
    tp = mesh[TENSOR_AXIS] if mesh.ndim > 1 else mesh
    validate_tp_mesh(model, tp)
    plan = _get_parallel_plan(model, sequence_parallel, None, tp_size=tp.size())
    parallelize_module(model, tp, plan)
    _update_attention_head_counts_for_tp(model, tp.size())
    return SelfSharded(model, after_backward=lambda: synchronize_tp_replica_gradients([model], mesh))


def _whole(source: HuggingFaceModel, *, force_hf: bool) -> nn.Module:
    """Of the class that Automodel takes for the configuration."""
    from nemo_automodel._transformers.model_init import _resolve_custom_model_cls_for_config

    config = deepcopy(source.config)
    config.architectures = [_architecture(config.model_type)]
    own = None if force_hf else _resolve_custom_model_cls_for_config(config)
    if own is None:
        return source.build(dtype=torch.get_default_dtype(), device=torch.get_default_device())
    model: nn.Module = own(config).to(torch.get_default_dtype())
    give_logits(model)
    return model.train()


def _architecture(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


FRAMEWORK = Framework(
    prefix="automodel",
    name="NeMo Automodel",
    distribution="nemo-automodel",
    extra="automodel",
    tried=("0.7.0",),
    namings=(
        (
            "automodel:TYPE",
            "a Hugging Face type as NeMo Automodel shards it, such as automodel:qwen3?sequence_parallel=true",
        ),
    ),
    find=_find,
)
