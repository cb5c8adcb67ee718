"""The step that verify proves, where nobody says which."""

import pytest

from shardwise.api import verify
from shardwise.core.case import Case
from shardwise.core.errors import PlanError
from shardwise.core.mesh import Mesh

MODEL = "llama3-debug?n_layers=2,hidden=48,n_heads=6,n_kv_heads=3,ffn_hidden=96,vocab_size=300"


@pytest.mark.parametrize(("mesh", "seq"), [("tp=2", 16), ("tp=3", 18), ("tp=32", 32), ("cp=3,tp=2", 18)])
def test_its_sequence_is_one_that_the_mesh_cuts_into_equal_parts(mesh: str, seq: int) -> None:
    from shardwise.verbs.verify import VerifyOptions, _settings

    found = _settings(Case.of(model=MODEL, mesh=mesh), VerifyOptions()).seq
    assert found == seq
    assert found % (Mesh.parse(mesh).tp * Mesh.parse(mesh).context) == 0


def test_a_plan_over_three_ranks_is_looked_at_without_a_word_about_the_sequence() -> None:
    case = Case.of(model=MODEL, mesh="tp=3", plans=["rowwise"])
    run = verify(case, static=True).answer
    assert (run.seq, run.is_no) == (18, False)
    with pytest.raises(PlanError, match="16 is no multiple of tp=3"):
        verify(case, static=True, seq=16)
