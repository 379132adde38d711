"""The scaling report: collectives in a program's text, tables from cells, a cell of four chips."""

import numpy as np
import pytest

from experiments.scaling import cells, report, tables
from experiments.scaling.cells import Cell
from experiments.scaling.collectives import Collective, collectives
from experiments.scaling.programs import EXCHANGES, Key
from pallas_kernels.tools import hlo

PROGRAM = """
HloModule jit_traced

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %permute = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1}}, metadata={op_name="jit(f)/jvp(M)/ppermute"}
  %done = f32[8,4]{1,0} collective-permute-done(%permute), metadata={op_name="jit(f)/jvp(M)/ppermute"}
}

%cond (p.3: (s32[], f32[8,4])) -> pred[] {
  %n = s32[] constant(4)
  %i = s32[] get-tuple-element(%p.3), index=0
  ROOT %less = pred[] compare(%i, %i), direction=LT
}

%fused (p.1: bf16[2,16]) -> bf16[8,16] {
  %gather = bf16[8,16]{1,0} all-gather(%p.1), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/transpose(jvp(M))/gather"}
}

%fused.1 (p.2: bf16[2,16]) -> bf16[8,16] {
  %rest = bf16[8,16]{1,0} all-gather(%p.2), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/transpose(jvp(M))/gather"}
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %one = s32[] constant(1)
  %copied = s32[] copy(%one)
  %t = (s32[], f32[8,4]{1,0}) tuple(%copied, %a)
  %loop = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %f = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%fused
  %f.1 = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%fused.1
  %sum = (f32[10]{0}, f32[6]{0}) all-reduce(%a, %a), replica_groups=mesh['data'=2,'seq'=4] {'seq'}, to_apply=%add, metadata={op_name="jit(f)/jvp(M)/psum"}
  %scattered = f32[5]{0} reduce-scatter(%a), replica_groups={{0,1,2},{3,4,5}}, dimensions={0}, to_apply=%add, metadata={op_name="jit(f)/jvp(M)/psum"}
}
"""  # noqa: E501


def test_collectives_are_counted_with_their_loops_and_bytes():
    assert collectives(PROGRAM) == [
        Collective("all-gather", "backward", 1, 8 * 16 * 2 * 3 // 4),
        Collective("all-reduce", "forward", 1, 2 * 16 * 4 * 3 // 4),
        Collective("collective-permute", "forward", 3, 3 * 8 * 4 * 4),
        Collective("reduce-scatter", "forward", 1, 5 * 4 * 2),
    ]
    with pytest.raises(hlo.Unreadable, match="loop does not say how often it turns"):
        collectives(PROGRAM.replace("known_trip_count", "unknown"))
    counted = PROGRAM.replace("known_trip_count", "unknown").replace(
        "compare(%i, %i)", "compare(%i, %n)"
    )
    assert collectives(counted) == collectives(PROGRAM)


def cell(exchange, chips, tokens, memory, *, moved=100, layers=1):
    figures = {
        "collectives": [
            {"kind": "all-gather", "direction": "forward", "count": 2, "bytes": moved},
            {"kind": "all-reduce", "direction": "backward", "count": 1, "bytes": 7},
        ],
        "memory": {"arguments": memory, "outputs": 0, "temporary": 0},
        "needs": None,
        "parameters": 1000,
        "seconds": 1.0,
    }
    key = Key(exchange, "v5e", chips, tokens, layers)
    return Cell(key=key, reason=None, figures=figures, commit=None, dirty=None)


def of(*found):
    return {each.key: each for each in found}


def test_the_longest_row_is_what_fills_the_chip():
    """Memory that is made of known terms is found again."""

    def memory(tokens, chips):
        return 2**20 + 3000 * tokens + 2 * tokens * chips

    known = of(*(cell("gather", c, t, memory(t, c)) for c, t in [(4, 64), (64, 64), (4, 128)]))
    one = tables.fit(known, "gather", 16)
    np.testing.assert_allclose(one[:2], (2**20, 3000 + 2 * 16), rtol=1e-9)
    length = tables.longest(one, 16)
    full = tables.stack(one, tables.LAYERS, length / 16)
    assert full <= tables.HBM["v5e"] < tables.stack(one, tables.LAYERS, length / 16 + 1)
    assert tables.longest(one, 16, split=True) > length
    assert tables.fit(of(cell("gather", 4, 64, 1)), "gather", 16) is None


def test_the_report_has_its_tables(tmp_path):
    known = of(
        cell("doubling", 4, 64, 2**20), cell("doubling", 4, 128, 2**21),
        cell("doubling", 64, 64, 2**20), cell("doubling", 256, 64, 2**20 + 2**14),
        cell("ring", 4, 64, 2**20, moved=5000), cell("doubling", 4, 64, 2**20, layers=2),
    )  # fmt: skip
    refused = Cell(Key("ulysses", "v5e", 256, 64, 1), "no heads", {"seconds": 1.0}, None, None)
    cells.save(tmp_path / "report.json", known | of(refused), {})
    assert cells.load(tmp_path / "report.json") == (known | of(refused), {})
    assert report.main(["--print-only", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| ring | 4 v5e | 2 all-gather | 5 kB | none | 0 B | 7 B | 1.05 MB |" in text
    assert "| doubling | 4 | 100 B at 256 | 100 B at 512 | equal |" in text
    assert "| doubling | 1.05 MB | - | 1.05 MB | 1.06 MB | 1.6 % |" in text
    assert "- ulysses v5e 256 64 1: no heads" in text
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_report_goes_on_where_it_was_stopped():
    config = report.ScalingConfig(exchange=("ring",), chips=(4,), tokens=(16_384,))
    one, two = report.wanted(config, {})
    assert (one.layers, two.layers) == (1, 2)
    assert report.wanted(config, of(cell(*one[:1], one.chips, one.tokens, 1))) == [two]


def test_what_is_not_known_is_refused(capsys):
    assert report.main(["--exchange", "rings"]) == 2
    assert (
        "exchange='rings' is not known (did you mean ring?); choose one of all_gather, doubling"
        in capsys.readouterr().err
    )
    assert report.main(["--chips", "8"]) == 2
    assert "chips=8 is not known; choose one of 4, 16, 64, 256, 512" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("name", EXCHANGES)
def test_a_cell_compiles(name):
    (found,) = report.measure([Key(name, "v5e", 4, 2048, 1)])
    assert found.reason is None
    assert found.bytes > 0
    assert found.exchanged("forward") > 0
    assert found.exchanged("backward") > 0
