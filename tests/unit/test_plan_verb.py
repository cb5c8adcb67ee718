"""shardwise plan and explain --dims: what they say of a model, and that the file reads back."""

import io
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from shardwise.cli.main import run
from shardwise.core.case import Case
from shardwise.core.dims import DimClass, Dims, Member
from shardwise.core.errors import OptionError
from shardwise.core.made_plan import MadePlan
from shardwise.core.plan import Plan
from shardwise.files.document import read_document, write_document
from shardwise.report.common.deliver import show
from shardwise.report.plan import rows
from shardwise.report.plan.picture import Group, picture
from shardwise.verbs.plan import PlanOptions, dims, plan
from tests.unit.plan_example import FUSED, LLAMA, NORMED, found, made


def named(which: Dims, name: str) -> DimClass:
    return next(each for each in which.classes if each.name == name)


def drawn(result: object) -> str:
    console = Console(file=io.StringIO(), width=80, no_color=True)
    show(result, "terminal", console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("model", [LLAMA, FUSED, NORMED])
@pytest.mark.parametrize("embedding", ["rowwise", "colwise", "routed", "replicated"])
def test_every_made_file_reads_back_as_the_plan_that_it_is(model: str, embedding: str) -> None:
    one = made(model, embedding=embedding)
    assert Plan.from_toml(one.to_toml()) == one.plan
    assert all(f"# {why}" in one.to_toml() for why in one.comments.values())


@pytest.mark.parametrize("result", [made(), found(LLAMA, "rowwise")], ids=["plan", "dims"])
def test_the_json_has_a_version_and_reads_back(result: MadePlan | Dims) -> None:
    document = write_document(result)
    assert msgspec.json.decode(document)["schema_version"] == 1
    assert read_document(document, type(result)) == result


def test_what_a_class_counts_is_told_by_what_the_forward_does_with_it() -> None:
    llama = found()
    assert {each.name for each in llama.classes if each.is_cut} == {"vocabulary", "KV heads", "inner width"}
    assert (named(llama, "KV heads").units, named(llama, "KV heads").where) == (4, "layers.*.attention")
    assert named(llama, "query heads of a KV head").units == 3
    assert named(llama, "hidden width").units == 384
    assert named(found(FUSED), "heads").units == 4


def test_equal_layers_are_one_class_with_how_many_there_are() -> None:
    heads = [each for each in found().classes if each.name == "KV heads"]
    assert [each.times for each in heads] == [3]
    assert [weight.times for weight in found().weights if weight.name == "layers.*.attention.wq.weight"] == [
        3
    ]


def test_why_colwise_then_rowwise_is_said_in_plain_words() -> None:
    assert rows.why(named(found(), "KV heads")) == (
        "wq, wk and wv make them, wo takes them back. So wq, wk and wv are cut by rows (colwise) and wo by "
        "columns (rowwise): nothing is sent in between, and there is one sum at the end, of what wo gives. "
        "With each go the query heads that share it. "
        "Backward, the parts of the gradient are summed at the input of attention."
    )
    assert "qkv is cut by the rows of each of its 3 pieces (colwise)" in rows.why(
        named(found(FUSED), "heads")
    )


def test_what_needs_all_of_a_class_is_told_and_that_it_is_gathered_there() -> None:
    words = rows.why(named(found(NORMED), "heads"))
    assert "norm needs all of them: there the ranks gather them, and cut them again. So qkv is cut" in words
    assert "nothing else is sent in between" in words


def test_each_end_and_a_class_that_no_weight_makes_are_told() -> None:
    heads = named(found(), "KV heads")
    twice = replace(heads, ends=(*heads.ends, "layers.*.attention.other"))
    assert "there is a sum at the end of each of wo and other." in rows.why(twice)
    assert "So wo is cut by columns (rowwise)" in rows.why(replace(heads, begins=()))


def test_a_module_that_makes_a_class_and_takes_it_back_is_told_once() -> None:
    where = "layers.*.mlp.experts"
    members = (Member(f"{where}.gate_up", 1, "shard(1: 8+8)", 3), Member(f"{where}.down", 2, "shard(2)", 3))
    experts = DimClass("inner width", where, 8, 2, 4, members, (where,), (where,), (where,), is_cut=True)
    assert rows.why(experts) == (
        "experts makes it and takes it back by itself: gate_up by dim 1 of each of its 2 pieces and down by "
        "dim 2. Nothing is sent inside; what experts gives is summed. Backward, the parts of the gradient "
        "are summed at the input of experts."
    )


def test_what_cannot_be_cut_says_why() -> None:
    hidden = rows.why(named(found(), "hidden width"))
    assert hidden.startswith("It can't be cut: ")
    assert "layers.*.attention_norm, layers.*.ffn_norm and norm need all of it." in hidden
    assert "2 ranks don't divide its 3" in rows.why(named(found(), "query heads of a KV head"))
    assert "cost fewer sums" in rows.why(named(found(FUSED), "width of a head"))


def test_the_shares_of_what_is_cut_and_what_is_whole_add_up() -> None:
    for embedding in ("rowwise", "replicated"):
        one = made(embedding=embedding)
        whole = sum(each.elements for each in one.whole)
        assert whole / one.parameters + one.sharded == pytest.approx(1)
        assert any(each.pattern == "tok_embeddings.weight" for each in one.whole) == (
            embedding == "replicated"
        )


def test_the_report_says_what_is_cut_what_stays_whole_and_what_to_do_next() -> None:
    text = drawn(made())
    assert "KV heads of layers.*.attention" in text
    assert "layers.*.attention_norm.weight" in text
    assert "The sequence is cut from the look-up to output" in text
    assert f"shardwise verify mine.toml --model '{LLAMA}' --mesh tp=2" in " ".join(text.split())
    unwished = plan(Case.of(model=LLAMA, mesh="tp=2", sequence_parallel=False))
    assert "The sequence isn't cut: it wasn't asked for." in drawn(unwished)


def test_the_report_says_what_is_cut_alone_and_why() -> None:
    one = made(mesh="tp=8")
    assert [each.pattern for each in one.alone] == [
        f"layers.*.attention.{name}" for name in ("wq", "wk", "wv", "wo")
    ]
    text = " ".join(drawn(one).split())
    assert "What is cut alone, and gathered at once" in text
    assert "8 ranks don't divide its 4" in text
    assert "What is cut alone" not in drawn(made())


def test_beside_the_dims_stands_what_a_plan_does_with_each_weight() -> None:
    beside = {each.name: each.rule for each in found(LLAMA, "rowwise").weights}
    assert beside["layers.*.attention.wq.weight"] == "colwise"
    assert beside["layers.*.attention_norm.weight"] == "sequence_parallel"


def test_a_plan_whose_rules_are_not_ours_is_refused_beside_the_dims() -> None:
    with pytest.raises(OptionError, match='plan "hf" has no rules of ours to show beside the dims'):
        found(LLAMA, "hf")


def test_a_mesh_without_tp_ranks_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"over two tp ranks or more, or experts over ep\. Use --mesh tp=2, or ep=2\."
    ):
        plan(Case.of(model=LLAMA, mesh="dp=2"), PlanOptions())


def groups(which: Dims) -> list[Group]:
    return [group for part in picture(which) for group in part.groups]


def test_the_picture_has_every_weight_once_and_each_ranks_part_of_what_is_cut() -> None:
    boxes = [box for group in groups(found()) for box in group.boxes]
    assert len(boxes) == len(found().weights)
    (table,) = [box for box in boxes if box.label == "tok_embeddings"]
    assert [band.is_own for band in table.bands] == [True, False]
    assert table.bands[0].height == pytest.approx(table.area.height / 2)
    (fused,) = [box for group in groups(found(FUSED)) for box in group.boxes if box.label == "qkv"]
    assert [band.is_own for band in fused.bands] == [True, False] * 3


def test_the_picture_puts_what_makes_a_class_before_what_takes_it_back() -> None:
    (heads,) = [group for group in groups(found()) if group.title.startswith("4 KV heads")]
    x_of = {box.label: box.area.x for box in heads.boxes}
    assert x_of["attention.wq"] == x_of["attention.wk"] < x_of["attention.wo"]
    assert heads.sum_x is not None


def test_toml_is_alone_on_stdout(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["plan", "--model", LLAMA, "--mesh", "tp=2", "--toml"])
    assert ended.value.code == 0
    assert Plan.from_toml(capsysbinary.readouterr().out.decode()) == made().plan


def test_toml_beside_another_format_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for more, said in ((["--json"], "--json"), (["--out", str(tmp_path)], "--out")):
        with pytest.raises(SystemExit) as ended:
            run(["plan", "--model", LLAMA, "--toml", *more])
        assert ended.value.code == 2
        assert f"--toml and {said} don't go together. Leave one out." in capsys.readouterr().err


def test_a_model_of_which_nothing_can_be_cut_still_has_dims() -> None:
    model = "llama3-debug?n_layers=1,hidden=36,n_heads=3,n_kv_heads=3,ffn_hidden=9,vocab_size=27"
    which = dims(Case.of(model=model, mesh="tp=2"))
    assert "2 ranks don't divide its 9" in rows.why(named(which, "inner width"))


def test_an_unknown_embedding_names_those_that_there_are() -> None:
    with pytest.raises(OptionError, match=r'--embedding is "row"\. Did you mean "rowwise"'):
        PlanOptions("row")
