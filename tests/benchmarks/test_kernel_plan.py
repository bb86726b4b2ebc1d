"""What is counted in machine code, and that the kernels keep what their plan rests on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import kernel_plan, sass_count

ROOT = Path(__file__).parents[2]

DATA = "\n".join(f"        /*{i:04x}*/    LDG.E.128.CONSTANT R{8 + 4 * i}, desc[UR4][R60.64+{i}] ;" for i in range(8))
LISTING = f"""
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.CONSTANT R2, desc[UR4][R4.64] ;
        /*0020*/                   ISETP.NE.AND P0, PT, R2, -0x1, PT ;
        /*0030*/                   BAR.RED.OR.DEFER_BLOCKING 0x0, P0 ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
        /*0050*/                   LDG.E.64.CONSTANT R60, desc[UR4][R6.64] ;
        /*0060*/                   IMAD.WIDE R60, R2, 0x10, R60 ;
.L_x_1:
{DATA}
        /*0100*/                   FFMA R3, R8, R8, R3 ;
        /*0110*/                   FFMA R3, R9, R9, R3 ;
        /*0120*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0130*/                   EXIT ;
"""


def test_a_listing_is_counted():
    """The load behind the barrier waits for the one before it, and the data for that: three in a row."""
    counted = sass_count.count_kernel(LISTING)
    assert (counted.before_loop, counted.loop) == (7, 11)
    assert counted.loop_by_kind == {"LDG": 8, "FFMA": 2, "BRA": 1}
    assert (counted.dependent_loads, counted.barriers_before_data) == (3, 1)
    with pytest.raises(ValueError, match="no loop with eight loads"):
        sass_count.count_kernel(LISTING.replace(".128", ""))


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 245), ("float8_e4m3fn", 505), ("int8", 375)])
def test_the_kernels_keep_few_instructions_a_head_and_two_loads_in_a_row(dtype, most):
    pytest.importorskip("cuda.core", reason="cuda.core is not installed (extra cuda)")
    pytest.importorskip("triton", reason="triton, which carries nvdisasm, is not installed")
    _, counted = kernel_plan.count(dtype)
    assert counted.loop <= most
    assert (counted.dependent_loads, counted.barriers_before_data) == (2, 1)


def test_a_report_of_the_suite_is_held_against_the_plan(tmp_path, monkeypatch):
    counted = sass_count.KernelCount(450, 240, {}, 2, 1)
    variant = kernel_plan.KernelVariant("bfloat16", 28, 4, 32, 128, 128)
    monkeypatch.setattr(kernel_plan, "count", lambda dtype: (variant, counted))
    row = {"dtype": "bfloat16", "pairs": 64, "kernel_us": 90.0}
    figures = {"tokens_per_block": 32, "copy_gb_s": 3000.0, "rows": [row, {"dtype": "int8", "pairs": 1}]}
    steps = [{"step": "search_bf16", "report": figures}, {"step": "plugin_build"}]
    report = tmp_path / "gpu_h100_part1.json"
    report.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "steps": steps}))
    (found,) = kernel_plan.measured([report])
    assert (found["device"], found["kernel_us"]) == ("NVIDIA H100 80GB HBM3", 90.0)
    # 235 MB at 3 TB/s are 78.3 us; a launch and two loads in a row before them.
    assert found["planned_us"] == pytest.approx(83.0, abs=0.1)


@pytest.mark.parametrize(("pairs", "bound"), [(1, "chain_us"), (8, "memory_us"), (64, "memory_us")])
def test_a_search_takes_its_start_and_then_what_bounds_it(pairs, bound):
    """One pair has 28 blocks of one layer: four heads in a row, of which the start has waited for the first."""
    variant = kernel_plan.KernelVariant("int8", 28, 4, 32, 128, 128)
    counted = sass_count.KernelCount(748, 368, {}, 2, 1)
    plan = kernel_plan.plan_search(variant, counted, pairs, kernel_plan.DEVICES["H100"])
    assert plan["expected_us"] == pytest.approx(plan["before_data_us"] + plan[bound])
    assert plan["before_data_us"] == pytest.approx(3.1 + 2 * 0.8)
    if pairs == 1:
        assert plan["chain_us"] == pytest.approx(3 * 0.8)


def test_the_committed_plan_is_that_of_the_committed_kernels():
    report = json.loads((ROOT / "benchmarks" / "results" / "kernel_plan.json").read_text())
    pytest.importorskip("cuda.core", reason="cuda.core is not installed (extra cuda)")
    pytest.importorskip("triton", reason="triton, which carries nvdisasm, is not installed")
    for dtype, counted in report["counted"].items():
        assert kernel_plan.count(dtype)[1].loop == counted["loop"]
