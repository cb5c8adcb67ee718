"""What the ranks of test_weights.py run: weights in, a few steps, a checkpoint, weights out."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.core.training import Saved
from shardwise.launch import RankContext
from shardwise.models.hugging_face import HuggingFaceModel, find_hugging_face
from shardwise.planner.make import Wish, make_plan
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.train.checkpoints import Checkpoints
from shardwise.train.weights import read_weights, write_weights

SIZES = "hidden_size=32,num_attention_heads=4,num_key_value_heads=2,vocab_size=64"
MIXTRAL = f"hf:mixtral?num_hidden_layers=2,intermediate_size=16,num_local_experts=12,{SIZES}"
MODELS = {
    # (what it is, whether its plan is made for it or transformers' own, its mesh)
    "llama": (f"hf:llama?num_hidden_layers=3,intermediate_size=48,{SIZES}", "made", "fsdp=2,tp=2"),
    "qwen3": (f"hf:qwen3?num_hidden_layers=3,intermediate_size=48,head_dim=8,{SIZES}", "hf", "fsdp=2,tp=2"),
    # files hold each expert by itself, and the model all of a layer in one
    "mixtral": (MIXTRAL, "hf", "fsdp=2,tp=2"),
    # each stage reads its own layers
    "mixtral in stages": (MIXTRAL, "unsharded", "pp=2,fsdp=2"),
}
# in `make test`: a made plan, and what its files hold in other pieces
TELLING = ("llama", "mixtral in stages")
STEPS, BATCH, SEQ = 3, 4, 8
# of a file: so that there are several
FILE_BYTES = 60_000


def source_of(name: str) -> HuggingFaceModel:
    return find_hugging_face(MODELS[name][0])


def ids_of(step: int) -> Tensor:
    return torch.randint(4, 64, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))


def run(context: RankContext, payload: bytes) -> bytes:
    """payload: a folder with one of weights for each model, and which of them. By model: this rank's
    parameters as they were read, each with its positions; the loss after so many steps; and what was left
    unused."""
    told, names = json.loads(payload)
    folder, answer = Path(told), {}
    for name in names:
        context.note(name)
        _, planned, axes = MODELS[name]
        source, mesh = source_of(name), device_mesh(Mesh.parse(axes), "cpu")
        stages = Mesh.parse(axes).stages
        plan: AnyPlan = (
            make_plan(source, Wish(Mesh.parse(axes), seq=SEQ)).plan
            if planned == "made"
            else TheirPlan(planned)
        )
        model = build_model(
            source,
            plan,
            mesh,
            dtype=torch.float64,
            device=torch.device("cpu"),
            seed=5,
            pipeline=Pipeline(stages) if stages > 1 else None,
        )
        unused = read_weights(folder / f"{name} in", model, source)
        step, portion = TrainStep(model, mesh=mesh, learning_rate=1e-2), Portion.on(mesh, stages)

        def parts(number: int, portion: Portion = portion) -> list[tuple[Tensor, Tensor]]:
            ids_BS = ids_of(number)
            return list(portion.cut(ids_BS[:, :-1], ids_BS[:, 1:]))

        losses = [step(parts(number)).loss.item() for number in range(STEPS)]
        after = step.gradients(parts(STEPS)).item()
        logits = None if stages > 1 else _whole(model(parts(STEPS)[0][0])).tolist()
        checkpoints = Checkpoints(folder / f"{name} checkpoints", mesh=Mesh.parse(axes))
        saved = Saved(STEPS, BATCH * STEPS, "", {}, {}, 1, 4)
        checkpoints.save(STEPS, model, step.optimizer, saved, wait=True)
        write_weights(checkpoints.newest(), source, folder / f"{name} out", file_bytes=FILE_BYTES)
        answer[name] = {"unused": unused, "losses": losses, "after": after, "logits": logits}
    return json.dumps(answer).encode()


def _whole(logits: Tensor) -> Tensor:
    return (logits.full_tensor() if isinstance(logits, DTensor) else logits).detach()
