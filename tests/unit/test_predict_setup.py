"""Machines by name or file, setups that can't be, and what sets two predictions apart."""

from dataclasses import replace
from pathlib import Path

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.errors import MachineError, OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import AttentionKernel, Precision, Setup, Term
from shardwise.core.program import Program
from shardwise.predict.check import check_setup
from shardwise.predict.contrast import differences
from shardwise.predict.machines import LARGEST_FILE, load_machine, machine_names, machine_text
from tests.unit.prediction_example import TERMS, prediction

PROGRAM = Program(
    "m",
    "rowwise",
    "native",
    "cuda",
    0,
    (("fsdp", 2), ("tp", 4)),
    StepSettings(2, 8),
    1,
    (),
    (),
    (),
    (),
    ("layers", 6),
)


def on(mesh: str, chunks: int = 1, micro_batches: int = 1) -> Setup:
    return Setup(Mesh.parse(mesh), micro_batches, chunks)


@pytest.mark.parametrize("name", machine_names())
def test_every_shipped_machine_reads_and_has_its_file_s_name(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert all(constant.source for constant in machine.constants)


def test_a_machine_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        machine_text("h100-sxm-80gb").replace('name = "h100-sxm-80gb"', 'name = "mine"')
    )
    assert load_machine(str(tmp_path / "mine.toml")).name == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100", 'unknown machine "h100". Did you mean "h100-sxm-80gb"? Known: '),
        ("../predict/machines", 'unknown machine "../predict/machines".'),
        ("no.toml", "machine file no.toml: No such file or directory. Give the path of a TOML file"),
        ("\0.toml", "machine file \\x00.toml: can't be a path."),
        ("large.toml", f"machine file large.toml: is larger than {LARGEST_FILE:,} bytes"),
        ("binary.toml", "machine file binary.toml: not UTF-8 text."),
        ("empty.toml", "empty.toml: "),
    ],
)
def test_what_is_no_machine_is_refused_in_a_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("large.toml").write_bytes(b"#" * (LARGEST_FILE + 1))
    Path("binary.toml").write_bytes(b"\xff\xfe")
    Path("empty.toml").write_bytes(b"")
    with pytest.raises(MachineError) as caught:
        load_machine(name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


REFUSED = [
    (
        Setup(chunks=2),
        "--chunks 2: chunks of layers are of a pipeline's stages. Use a mesh with pp=2 or more.",
    ),
    (on("pp=7,fsdp=2,tp=4"), "pp=7: m has 6 layers, and can't be cut into 7 stages. Use at most pp=6."),
    (
        on("pp=4,fsdp=2,tp=4", chunks=2, micro_batches=4),
        "pp=4: m has 6 layers, and can't be cut into 4 stages of 2 chunks. Use at most pp=3.",
    ),
    (
        on("pp=2,fsdp=2,tp=4", chunks=2, micro_batches=5),
        "--schedule interleaved: takes micro-batches in rounds of 2 stages, and 5 can't be dealt to 2 equal "
        "ones. Use --accumulation 4 or 6.",
    ),
    (
        on("fsdp=2,tp=2"),
        "the program was traced at tp=4, and the mesh has tp=2. Only dp and fsdp can be rescaled.",
    ),
    (on("dp=2,fsdp=2,tp=4"), "the program was traced at dp=1, and the mesh has dp=2."),
    (on("fsdp=1,tp=4"), "the program was traced at fsdp=2, and the mesh has fsdp=1."),
    (on("tp=4"), "the program was traced at fsdp=2, and the mesh has fsdp=1."),
    (
        on("pp=4,fsdp=2,tp=4"),
        "--schedule 1f1b: 4 stages need at least as many micro-batches, and --accumulation is 1.",
    ),
    (
        Setup(precision=Precision.MASTER),
        "--precision master: keeps float32 beside parameters in half precision, and these are float32. Use "
        "--dtype",
    ),
    (
        Setup(recompute_attention=True),
        "--recompute selective: is of unfused attention. Add --attention unfused",
    ),
]


@pytest.mark.parametrize(("setup", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_setup_that_can_t_be_is_said(setup: Setup, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_setup(PROGRAM, load_machine("h100-sxm-80gb"), setup)
    assert str(caught.value).startswith(message)


def test_context_ranks_need_a_program_that_reduces_its_gradients() -> None:
    machine = load_machine("h100-sxm-80gb")
    check_setup(PROGRAM, machine, on("fsdp=1,cp=4,tp=4"))
    alone = replace(PROGRAM, axes=(("dp", 1), ("tp", 4)))
    with pytest.raises(OptionError) as caught:
        check_setup(alone, machine, on("dp=1,cp=4,tp=4"))
    assert str(caught.value) == (
        "mesh dp=1,cp=4,tp=4: the program was traced at dp=1, without reducing its gradients over other "
        "ranks. "
        "Trace it with cp=4."
    )


def test_a_layer_that_runs_again_has_no_attention_to_run_again() -> None:
    again = replace(PROGRAM, settings=replace(PROGRAM.settings, recompute="full"))
    setup = Setup(recompute_attention=True, attention=AttentionKernel.UNFUSED)
    check_setup(PROGRAM, load_machine("h100-sxm-80gb"), setup)
    with pytest.raises(OptionError, match="--recompute selective: the program's layers run again as a whole"):
        check_setup(again, load_machine("h100-sxm-80gb"), setup)


def test_a_machine_of_one_node_has_an_end() -> None:
    alone = replace(load_machine("h100-sxm-80gb"), between=None)
    check_setup(PROGRAM, alone, Setup())
    with pytest.raises(
        OptionError, match=r"mesh pp=2,fsdp=2,tp=4 is 16 devices, and machine h100-sxm-80gb is one node of 8"
    ):
        check_setup(PROGRAM, alone, on("pp=2,fsdp=2,tp=4", micro_batches=2))
    with pytest.raises(
        OptionError, match="the program is of device cuda, and machine h100-sxm-80gb is of device cpu"
    ):
        check_setup(PROGRAM, replace(alone, device="cpu"), Setup())


def test_a_program_without_layers_has_no_stages() -> None:
    with pytest.raises(
        OptionError, match=r"m has no row of equal layers that could be cut into stages. Use pp=1"
    ):
        check_setup(replace(PROGRAM, layers=None), load_machine("h100-sxm-80gb"), on("pp=2,fsdp=2,tp=4"))


def test_the_term_that_differs_most_is_named_with_its_sign() -> None:
    faster = prediction("colwise", terms=TERMS | {Term.TENSOR: 0.005, Term.KERNELS: 0.021})
    (found,) = differences([prediction(), faster])
    assert (found.plan, found.term) == ("colwise", Term.TENSOR)
    assert found.ratio == pytest.approx(0.91)
    assert found.term_s == pytest.approx(-0.01)
