"""Meshes: axes, sizes, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.core.errors import MeshError
from shardwise.core.mesh import AXES, NAMES, PREDICTED, Mesh, Role, axes_in, check_carried, joined, role_of

SIZES = st.integers(min_value=1, max_value=4096)
MESHES = st.dictionaries(st.sampled_from(NAMES), SIZES, min_size=1).map(
    lambda sizes: Mesh(tuple((name, sizes[name]) for name in NAMES if name in sizes))
)


def test_a_mesh_has_its_axes_outermost_first() -> None:
    mesh = Mesh.parse("dp=2,fsdp=3,tp=4")
    assert mesh.axes == (("dp", 2), ("fsdp", 3), ("tp", 4))
    assert mesh.world_size == 24
    assert mesh.tp == 4
    assert mesh.data_parallel == 6
    assert str(mesh) == "dp=2,fsdp=3,tp=4"


def test_a_mesh_without_a_tp_axis_has_one_of_size_1() -> None:
    mesh = Mesh.parse("dp=8")
    assert mesh.axes == (("dp", 8), ("tp", 1))
    assert mesh.tp == 1
    assert mesh == Mesh.parse("dp=8,tp=1")


def test_an_axis_that_is_not_named_has_size_1() -> None:
    assert Mesh.parse("tp=2").size("dp") == 1
    assert Mesh.parse("tp=2").data_parallel == 1


def test_spaces_around_names_and_sizes_are_fine() -> None:
    assert Mesh.parse(" dp = 2 , tp = 4 ") == Mesh.parse("dp=2,tp=4")


@given(MESHES)
def test_a_mesh_reads_its_own_text(mesh: Mesh) -> None:
    assert Mesh.parse(str(mesh)) == mesh
    assert hash(Mesh.parse(str(mesh))) == hash(mesh)


@given(MESHES)
def test_the_sizes_of_all_roles_make_all_ranks(mesh: Mesh) -> None:
    assert math.prod(mesh.size_of(role) for role in Role) == mesh.world_size
    split = (Role.REPLICATES, Role.SHARDS_PARAMETERS, Role.CUTS_EXPERTS)
    assert mesh.data_parallel == math.prod(map(mesh.size_of, split))


@given(MESHES)
def test_every_gradient_is_summed_once_over_each_axis_whose_ranks_see_other_tokens(mesh: Mesh) -> None:
    by_fsdp = [name for name in mesh.shard_axes if mesh.size(name) > 1]
    assert sorted((*by_fsdp, *mesh.summing_axes)) == sorted(mesh.token_axes)
    assert math.prod(map(mesh.size, mesh.token_axes)) == mesh.data_parallel * mesh.context


@pytest.mark.parametrize(
    ("mesh", "shards", "sums"),
    [
        ("tp=4", (), ()),
        ("dp=2,tp=2", (), ("dp",)),
        ("fsdp=2,tp=2", ("fsdp",), ()),
        ("dp=2,fsdp=2", ("fsdp",), ("dp",)),
        ("fsdp=2,cp=2", ("fsdp", "cp"), ()),
        ("fsdp=1,cp=2", ("fsdp", "cp"), ()),
        ("dp=2,cp=2", (), ("dp", "cp")),
        ("dp=2,fsdp=2,cp=2,ep=2", ("fsdp", "cp"), ("dp", "ep")),
        ("fsdp=1,tp=2", (), ()),
        ("pp=2,dp=2,ep=2,tp=2", (), ("dp", "ep")),
    ],
)
def test_fsdp_sums_over_its_shards_and_the_step_over_what_is_left(
    mesh: str, shards: tuple[str, ...], sums: tuple[str, ...]
) -> None:
    assert Mesh.parse(mesh).shard_axes == shards
    assert Mesh.parse(mesh).summing_axes == sums


def test_joined_axes_are_one_name_with_all_their_ranks_and_the_first_one_s_role() -> None:
    name = joined(("fsdp", "cp"))
    assert axes_in(name) == ("fsdp", "cp")
    assert Mesh.parse("fsdp=4,cp=2").size(name) == 8
    assert role_of(name) is Role.SHARDS_PARAMETERS


def test_experts_have_a_group_without_the_axis_over_which_they_are_cut() -> None:
    joined_axes = Mesh.parse("dp=2,cp=2,ep=2,tp=2").joined_axes
    assert joined_axes == (("dp", "cp", "ep"), ("dp", "cp"))


@given(MESHES)
def test_a_mesh_of_its_roles_is_itself(mesh: Mesh) -> None:
    sizes = {axis.role: mesh.size(axis.name) for axis in AXES if axis.name in dict(mesh.axes)}
    assert Mesh.of(sizes) == mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'mesh: can\'t read "" in "". Write NAME=SIZE, such as dp=2,tp=4.'),
        ("tp", 'mesh: can\'t read "tp" in "tp". Write NAME=SIZE, such as dp=2,tp=4.'),
        ("dp=2,,tp=4", 'mesh: can\'t read "" in "dp=2,,tp=4". Write NAME=SIZE, such as dp=2,tp=4.'),
        ("tp=two", 'mesh: can\'t read "tp=two" in "tp=two". Write NAME=SIZE, such as dp=2,tp=4.'),
        ("tp=-2", 'mesh: can\'t read "tp=-2" in "tp=-2". Write NAME=SIZE, such as dp=2,tp=4.'),
        ("tp=2.0", 'mesh: can\'t read "tp=2.0" in "tp=2.0". Write NAME=SIZE, such as dp=2,tp=4.'),
        ("tp=0", "mesh: axis tp=0 is not a size. Use a whole number of at least 1."),
        ("xp=2", 'mesh: unknown axis "xp". Allowed axes: pp, dp, fsdp, cp, ep, tp.'),
        ("tp=2,tp=4", "mesh: an axis is named twice in tp=2,tp=4. Name each axis once."),
        (
            "tp=2,dp=4",
            "mesh: axes of tp=2,dp=4 are out of order. Write them in the order pp, dp, fsdp, cp, ep, tp.",
        ),
    ],
)
def test_a_wrong_mesh_is_one_line(text: str, message: str) -> None:
    with pytest.raises(MeshError) as caught:
        Mesh.parse(text)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("mesh", "axis"),
    [
        ("tp=4", None),
        ("dp=2,tp=4", "dp"),
        ("fsdp=2,tp=4", "fsdp"),
        ("dp=2,fsdp=2", "fsdp"),
        ("dp=4,fsdp=1", "dp"),
        ("dp=1,fsdp=1", "fsdp"),
    ],
)
def test_context_ranks_join_fsdp_before_dp_and_several_ranks_before_one(mesh: str, axis: str | None) -> None:
    assert Mesh.parse(mesh).reducing_axis == axis


def test_a_verb_refuses_the_axes_that_it_cannot_carry_and_names_those_it_can() -> None:
    with pytest.raises(MeshError) as caught:
        check_carried(Mesh.parse("pp=2,cp=2,tp=4"), "a verb", (Role.REPLICATES, Role.CUTS_TENSORS))
    assert str(caught.value) == ("mesh pp=2,cp=2,tp=4: a verb can't carry pp or cp yet. Use the axes dp, tp.")
    check_carried(Mesh.parse("pp=2,cp=2,tp=4"), "predict", PREDICTED)
    check_carried(Mesh.parse("ep=1,tp=4"), "predict", PREDICTED)
