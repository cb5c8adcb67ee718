"""Decides of exhibits, right or wrong, by running them: gloo ranks against one process, in float64. Needs
torch alone, and shares nothing with any tool that is tried on the museum.

    python museum/judge.py 7             exhibit 7, before and after it was mended
    python museum/judge.py 7 --before    as it was reported
    python museum/judge.py --all         every exhibit, in one launch for each number of ranks
    ... --curve                          and 200 training steps of each: what a loss curve would have shown
    ... --json FILE                      the answers as JSON

One process and the ranks begin with the same weights, drawn by the parameters' names, and take the same
global batch, whose sequences have masked beginnings of unequal lengths. Of a model that shards itself the
outputs and all gradients are compared; of a whole training step what it changes with SGD at learning rate 1
(its clipped gradients), the loss that it reports, and whether ranks still hold alike what they should.
Anything that is off by more than 1e-6, relative to its norm, is wrong; so is a step that raises.
"""

import argparse
import ast
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any
from zlib import crc32

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402

from museum.parts import dealt  # noqa: E402

WRONG = 1e-6
STEPS, LAST, WINDOW = 200, 50, 20
SEEDS = (1, 2, 3)
VOCAB, SEQ, BATCH, IGNORED = 40, 16, 4, -100
# over these axes of a mesh ranks see other sequences, and sum the gradients of what they hold alike
CUTS_BATCH = ("dp", "fsdp", "ep")
ALONE_S, LAUNCH_S = 20, 3600


@dataclass(frozen=True)
class Exhibit:
    """What ABOUT says; `module` is what to import."""

    number: int
    module: str
    about: dict[str, Any] = field(repr=False)

    @property
    def axes(self) -> dict[str, int]:
        pairs = (each.split("=") for each in self.about["mesh"].split(","))
        return {name: int(size) for name, size in pairs}

    @property
    def ranks(self) -> int:
        return math.prod(self.axes.values())

    @property
    def batch(self) -> int:
        return int(self.about.get("batch", BATCH))

    @property
    def is_step(self) -> bool:
        return bool(self.about["kind"] == "step")


@dataclass
class Curve:
    """Losses that the run reports, against one process's. largest: of |L - L1| / L1 over all steps, both
    averaged over 20 steps as a smoothed curve is. lasting: (L - L1) / L1 of the mean over the last 50 steps.
    seeds: the largest |lasting| of one process with other first weights.
    """

    largest: float
    lasting: float
    seeds: float
    losses: list[float]
    one_process: list[float]

    @property
    def is_noticed(self) -> bool:
        """Whether it is further off, at the end, than twice what other first weights do."""
        return not abs(self.lasting) <= 2 * self.seeds


@dataclass
class Judgement:
    """errors: by parameter, "output" or "loss", relative, the largest over the ranks."""

    number: int
    variant: str
    is_wrong: bool
    raised: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    curve: Curve | None = None

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda each: each[1], default=("", 0.0))


def exhibits() -> list[Exhibit]:
    """All of them, by number. Nothing is imported: ABOUT is a literal."""
    found = []
    for path in sorted((FOLDER / "exhibits").glob("e*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ABOUT":
                about = ast.literal_eval(node.value)
                found.append(Exhibit(about["number"], f"museum.exhibits.{path.stem}", about))
    return sorted(found, key=lambda each: each.number)


# ------------------------------------------------------------------------------------------ one exhibit


def whole_model(exhibit: Exhibit, fault: bool, seed: int = 0) -> nn.Module:
    """The unsharded model, the same on every rank."""
    torch.manual_seed(seed)
    model: nn.Module = import_module(exhibit.module).build(fault=fault)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(crc32(f"{name} {seed}".encode()))
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model


@torch.no_grad()
def sharded_model(exhibit: Exhibit, fault: bool, mesh: DeviceMesh, whole: nn.Module) -> nn.Module:
    """As the exhibit shards it, with the whole one's weights."""
    torch.manual_seed(0)
    model: nn.Module = import_module(exhibit.module).build(mesh, fault=fault)
    values = dict(whole.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        value = values[name].detach()
        if isinstance(parameter, DTensor):
            cut = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(cut.to_local())
        else:
            parameter.copy_(value)
    return model


def batch_of(exhibit: Exhibit, number: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [B, S] of global batch `number`: a walk that mostly follows one rule, so that there is
    something to learn; the beginning of each sequence isn't counted, as a prompt isn't."""
    generator = torch.Generator().manual_seed(1000 + number)
    ids = torch.randint(VOCAB, (exhibit.batch, SEQ + 1), generator=generator)
    follows = torch.rand(exhibit.batch, SEQ, generator=generator) < 0.8
    for at in range(SEQ):
        ids[:, at + 1] = torch.where(follows[:, at], (3 * ids[:, at] + 7) % VOCAB, ids[:, at + 1])
    labels = ids[:, 1:].clone()
    for sequence, length in enumerate(
        torch.randint(SEQ // 2, (exhibit.batch,), generator=generator).tolist()
    ):
        labels[sequence, : length + sequence % 3] = IGNORED
    return ids[:, :-1].contiguous(), labels


def gradients(
    model: nn.Module, ids: Tensor, labels: Tensor, mesh: DeviceMesh | None
) -> tuple[Tensor, Tensor]:
    """(whole logits of this rank's sequences, the global batch's mean loss); gradients are left on the model:
    a plain training step, which sums over the axes whose ranks see other sequences."""
    n_valid = (labels != IGNORED).sum()
    groups = {}
    for name in (mesh.mesh_dim_names or ()) if mesh is not None else ():
        assert mesh is not None
        if name in CUTS_BATCH and mesh[name].size() > 1:
            groups[name] = mesh.get_group(name)
            ids, labels = (
                each.chunk(groups[name].size())[mesh.get_local_rank(name)] for each in (ids, labels)
            )
    logits = model(ids)
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    loss = (
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        / n_valid
    )
    loss.backward()
    total = loss.detach().clone()
    for name, group in groups.items():
        dist.all_reduce(total, group=group)
        for parameter in model.parameters():
            if parameter.grad is not None and not _is_cut(parameter, name):
                dist.all_reduce(_local(parameter.grad), group=group)
    return logits.detach(), total


def _is_cut(parameter: Tensor, axis: str) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(
        name == axis and placed.is_shard() for name, placed in zip(names, parameter.placements, strict=True)
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def errors_of_model(exhibit: Exhibit, fault: bool, mesh: DeviceMesh) -> dict[str, float]:
    """Of the outputs and every gradient."""
    whole = whole_model(exhibit, fault)
    ids, labels = batch_of(exhibit, 0)
    expected, _ = gradients(whole, ids, labels, None)
    sharded = sharded_model(exhibit, fault, mesh, whole)
    logits, _ = gradients(sharded, ids, labels, mesh)
    for name, size in exhibit.axes.items():
        if name in CUTS_BATCH and size > 1:
            expected = expected.chunk(size)[mesh.get_local_rank(name)]
    errors = {"output": _far(logits, expected)}
    own = dict(sharded.named_parameters(remove_duplicate=False))
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            found = own[name].grad
            errors[name] = _far(None if found is None else _whole(found), parameter.grad)
    return _over_ranks(errors)


def errors_of_step(exhibit: Exhibit, fault: bool, mesh: DeviceMesh) -> dict[str, float]:
    """Of what the step changes, of the loss that it reports, and of what ranks should hold alike."""
    step = import_module(exhibit.module).step
    whole = whole_model(exhibit, fault)
    sharded = sharded_model(exhibit, fault, mesh, whole)
    first = {name: each.detach().clone() for name, each in whole.named_parameters()}
    losses = []
    for model, own_mesh in ((whole, None), (sharded, mesh)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
        given = batch_of(exhibit, 0) if own_mesh is None else dealt(batch_of(exhibit, 0), own_mesh)
        losses.append(float(step(model, optimizer, given, own_mesh, fault)))
    errors = {"loss": abs(losses[1] - losses[0]) / abs(losses[0])}
    own = dict(sharded.named_parameters(remove_duplicate=False))
    for name, parameter in whole.named_parameters():
        if name in own:  # else another stage of a pipeline has it
            errors[name] = _far(_whole(own[name].detach()) - first[name], parameter.detach() - first[name])
    buffers = dict(sharded.named_buffers())
    for name, buffer in whole.named_buffers():
        errors[name] = _far(buffers[name].double(), buffer.double())
    return _over_ranks(errors)


def _far(found: Tensor | None, expected: Tensor | None) -> float:
    """Relative to the expected one's norm; infinite where the shapes differ or one side alone has any."""
    if found is None or expected is None:
        present = expected if found is None else found
        return float("inf") if present is not None and bool(present.any()) else 0.0
    if found.shape != expected.shape:
        return float("inf")
    off = float((found - expected).norm()) / (float(expected.norm()) or 1.0)
    return off if math.isfinite(off) else float("inf")


def _over_ranks(errors: dict[str, float]) -> dict[str, float]:
    every: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, errors)
    names = dict.fromkeys(name for each in every for name in each)
    return {name: max(each.get(name, 0.0) for each in every) for name in names}


# -------------------------------------------------------------------------------------------- curves


def losses_of(exhibit: Exhibit, fault: bool, mesh: DeviceMesh | None, seed: int = 0) -> list[float]:
    """200 steps of AdamW; the loss that each step reports."""
    model = whole_model(exhibit, fault, seed)
    if mesh is not None:
        model = sharded_model(exhibit, fault, mesh, model)
    if exhibit.is_step:
        step = import_module(exhibit.module).step
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
        batches = (batch_of(exhibit, number) for number in range(STEPS))
        given = batches if mesh is None else (dealt(batch, mesh) for batch in batches)
        return [float(step(model, optimizer, batch, mesh, fault)) for batch in given]
    # AdamW goes element by element, so it may run on what each rank holds
    leaves = {each: nn.Parameter(_local(each.detach())) for each in model.parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for number in range(STEPS):
        model.zero_grad()
        losses.append(float(gradients(model, *batch_of(exhibit, number), mesh)[1]))
        for parameter, leaf in leaves.items():
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
                gradient = gradient.redistribute(placements=parameter.placements)
            leaf.grad = None if gradient is None else _local(gradient)
        optimizer.step()
    return losses


def curve_of(exhibit: Exhibit, fault: bool, mesh: DeviceMesh, one: dict[int, list[float]]) -> Curve:
    """one: one process's losses, by seed of its first weights."""
    losses = losses_of(exhibit, fault, mesh)
    right = one[0]
    pairs = zip(_smoothed(losses), _smoothed(right), strict=True)
    largest = max(abs(own - other) / abs(other) for own, other in pairs)
    seeds = max(abs(_lasting(one[seed], right)) for seed in SEEDS)
    return Curve(largest, _lasting(losses, right), seeds, losses, right)


def _smoothed(losses: list[float]) -> list[float]:
    return [sum(losses[at : at + WINDOW]) / WINDOW for at in range(len(losses) - WINDOW + 1)]


def _lasting(losses: list[float], right: list[float]) -> float:
    return sum(losses[-LAST:]) / sum(right[-LAST:]) - 1.0


# --------------------------------------------------------------------------------------------- ranks


def run_rank(rank: int, ranks: int, store: str, out: str, todo: list[str], curve: bool) -> None:
    """Judges what is to do, "NUMBER variant" each; rank 0 writes a line of JSON for each."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    shared = torch.distributed.FileStore(store, ranks)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=shared, rank=rank, world_size=ranks, timeout=timedelta(seconds=ALONE_S)
    )
    known = {each.number: each for each in exhibits()}
    meshes: dict[str, DeviceMesh] = {}
    one: dict[int, dict[int, list[float]]] = {}
    for place, each in enumerate(todo):
        number, variant = each.split()
        exhibit = known[int(number)]
        if exhibit.about["mesh"] not in meshes:
            names, sizes = zip(*exhibit.axes.items(), strict=True)
            meshes[exhibit.about["mesh"]] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        answer = _judged(exhibit, variant, meshes[exhibit.about["mesh"]], one, curve)
        keys = [f"{place}/{other}" for other in range(ranks)]
        shared.set(keys[rank], answer.raised)
        shared.wait(keys, timedelta(seconds=2 * ALONE_S))  # raises where the ranks have parted
        if rank == 0:
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(answer)) + "\n")
            _show(answer)
        if answer.raised.startswith("alone"):
            raise SystemExit(3)
    dist.destroy_process_group()


def _judged(
    exhibit: Exhibit, variant: str, mesh: DeviceMesh, one: dict[int, dict[int, list[float]]], curve: bool
) -> Judgement:
    began, fault = time.perf_counter(), variant == "before"
    try:
        errors = (errors_of_step if exhibit.is_step else errors_of_model)(exhibit, fault, mesh)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Judgement(exhibit.number, variant, True, said, seconds=time.perf_counter() - began)
    answer = Judgement(exhibit.number, variant, not max(errors.values()) <= WRONG, errors=errors)
    answer.seconds = time.perf_counter() - began
    if curve:
        if exhibit.number not in one:
            seeds = (0, *SEEDS)
            own = {
                seed: losses_of(exhibit, False, None, seed)
                for seed in seeds
                if seed % dist.get_world_size() == dist.get_rank()
            }
            every: list[dict[int, list[float]]] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(every, own)
            one[exhibit.number] = {seed: losses for each in every for seed, losses in each.items()}
        answer.curve = curve_of(exhibit, fault, mesh, one[exhibit.number])
    return answer


def judged(wanted: list[tuple[Exhibit, str]], *, curve: bool = False) -> list[Judgement]:
    """Of each (exhibit, "before" or "after"), in order; prints each as it comes."""
    answers: dict[tuple[int, str], Judgement] = {}
    for ranks in sorted({exhibit.ranks for exhibit, _ in wanted}):
        left = [(exhibit.number, variant) for exhibit, variant in wanted if exhibit.ranks == ranks]
        while left:
            done, said = _launch(ranks, [f"{number} {variant}" for number, variant in left], curve)
            if len(done) < len(left):  # it took its launch down
                number, variant = left[len(done)]
                done.append(Judgement(number, variant, True, raised=said))
                _show(done[-1])
            answers |= {(answer.number, answer.variant): answer for answer in done}
            left = left[len(done) :]
    return [answers[exhibit.number, variant] for exhibit, variant in wanted]


def _launch(ranks: int, todo: list[str], curve: bool) -> tuple[list[Judgement], str]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "answers")
        given = json.dumps([str(Path(folder, "store")), str(out), todo, curve])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__)), "--rank"]
        processes = [
            subprocess.Popen([*command, f"{rank}/{ranks}", given], env=environment, stderr=subprocess.PIPE)
            for rank in range(ranks)
        ]
        said = ""
        try:
            for process in processes:
                _, text = process.communicate(timeout=LAUNCH_S)
                said = said or (text.decode(errors="replace").strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            said = f"nothing after {LAUNCH_S} s"
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return [read(json.loads(line)) for line in lines], said[:200] or "the launch ended"


def read(answer: dict[str, Any]) -> Judgement:
    curve = answer.pop("curve")
    return Judgement(**answer, curve=Curve(**curve) if curve else None)


def _show(answer: Judgement) -> None:
    name, error = answer.worst
    what = answer.raised or f"{name} is {error:.1e} off"
    line = f"{answer.number:3} {answer.variant:6} {'wrong' if answer.is_wrong else 'right'}  {what}"
    if answer.curve is not None:
        curve = answer.curve
        line += (
            f"; loss curve: at most {curve.largest:.1%} off, at the end {curve.lasting:+.1%} "
            f"(other seeds {curve.seeds:.1%}): {'noticed' if curve.is_noticed else 'not noticed'}"
        )
    print(line, flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--rank"]:
        rank, ranks = map(int, sys.argv[2].split("/"))
        run_rank(rank, ranks, *json.loads(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="Exit code 1 where an answer isn't as expected."
    )
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--all", action="store_true", help="every exhibit")
    parser.add_argument("--before", action="store_true", help="as reported only")
    parser.add_argument("--after", action="store_true", help="as mended only")
    parser.add_argument("--curve", action="store_true", help=f"{STEPS} training steps too")
    parser.add_argument("--json", metavar="FILE", help="write the answers; - prints them")
    given = parser.parse_args()
    chosen = [each for each in exhibits() if given.all or each.number in given.numbers]
    if not chosen:
        parser.error("name exhibits by number, or --all")
    variants = [each for each in ("before", "after") if getattr(given, each)] or ["before", "after"]
    answers = judged([(each, variant) for each in chosen for variant in variants], curve=given.curve)
    if given.json:
        text = json.dumps([asdict(each) for each in answers], indent=1)
        print(text) if given.json == "-" else Path(given.json).write_text(text + "\n", encoding="utf-8")
    return int(any(each.is_wrong != (each.variant == "before") for each in answers))


if __name__ == "__main__":
    sys.exit(main())
