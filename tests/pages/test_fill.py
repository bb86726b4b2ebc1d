"""Pages are written anew from their results: what has changed changes, in the form that it has, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.pages.fill import as_shown, filled
from benchmarks.pages.markers import ROOT
from trtllm_memshare.errors import UserError


@pytest.mark.parametrize(
    "page", ["docs/pressure.md", "docs/pressure_figures.md", "docs/vllm_figures.md", "docs/toy.md"]
)
def test_pages_are_as_the_command_leaves_them(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert filled(text) == text


SCHEDULE = "benchmarks/results/vllm_schedule.json"
PAGE = f"""Half kept takes 4,097<!--= {SCHEDULE} runs[part=4][arm=0.5].steps --> steps,
30.9 %<!--= {SCHEDULE} 1 - runs[part=4][arm=0.5].steps / runs[part=4][arm=vllm].steps --> fewer.

<!--rows= {SCHEDULE} runs[part=4]
arm: vllm; 0.5 | steps | _ | p50_steps & p99_steps -->

| arm | steps | what | steps |
| --- | ---: | --- | ---: |
| vLLM | **5,931** | the words stay | 2,902 / 5,782 |
| half kept | 4,097 | 7 | - |

<!--table= benchmarks/studies/real_model/results/loops.json trtllm_memshare.report.real_model:loops_table -->
| a | table |
| --- | --- |
| of | before |
The end: 4,097.
"""


def test_what_is_wrong_is_put_right_in_its_form():
    wrong = (
        PAGE.replace("takes 4,097", "takes 1").replace("30.9 %", "1.0 %").replace("5,931", "1").replace("2,902", "0")
    )
    right = filled(wrong)
    assert right == filled(PAGE)
    for line in (
        "takes 4,097<",
        "| vLLM | **5,931** | the words stay | 2,902 / 5,782 |",
        "| half kept | 4,097 | 7 | - |",
    ):
        assert line in right
    assert "| of | before |" not in right
    assert "| the runaway trace's own |" in right
    assert right.endswith("The end: 4,097.\n")


@pytest.mark.parametrize(
    ("value", "shown", "is_percent", "expected"),
    [
        (1234.5, "9.1", False, "1,234.5"),
        (-0.0042, "-0.0030", False, "-0.0042"),
        (0.0042, "+0.0030", False, "+0.0042"),
        (0.994, "1.0", True, "99.4"),
        (4.83e-7, "1.0e-06", False, "4.8e-07"),
        ("42 of 52", "1 of 2", False, "42 of 52"),
        (0.0002, "< 0.001", False, "< 0.001"),
    ],
)
def test_a_value_takes_the_form_of_what_stands_there(value, shown, is_percent, expected):
    assert as_shown(value, shown, is_percent) == expected


def test_a_bound_that_does_not_hold_is_for_whoever_writes():
    with pytest.raises(UserError, match=r"the page says < 0\.001, got 0\.02"):
        as_shown(0.02, "< 0.001", False)


def test_a_result_that_is_no_number_is_written_nowhere():
    for value in (float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"the page says 1\.0, got"):
            as_shown(value, "1.0", False)
    with pytest.raises(UserError, match="which no marker could stand behind"):
        filled(f"1<!--= {SCHEDULE} runs[part=4][arm=vllm].arm -->")


def test_a_line_of_a_table_keeps_its_form():
    marker = f"<!--rows= {SCHEDULE} runs[part=4]\narm: vllm; 0.5 | steps | _ -->\n\n|a|b|c|\n|-|-|-|\n"
    note = "<!-- a note -->"
    right = f"{marker}|  |**5,931**|x \\ y|\n| half |4,097 {note}||\n"
    assert filled(right.replace("5,931", "7").replace("4,097", "8")) == right


def test_a_marker_whose_table_is_gone_takes_no_other_one():
    gone = PAGE.replace(
        "| a | table |\n| --- | --- |\n| of | before |\n", "Words.\n\n| another | table |\n| --- | --- |\n"
    )
    with pytest.raises(AssertionError, match="words come first"):
        filled(gone)
