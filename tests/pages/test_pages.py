"""Every page says what is there: its figures are those of the results, and its paths, links and make targets exist.

``markers.py`` says how a page refers to a result.
"""

from __future__ import annotations

import re

import pytest

from benchmarks.pages.markers import (
    FIGURE,
    ROOT,
    ROWS,
    TABLE,
    evaluate,
    is_shown,
    look_up,
    wrong_cells,
    wrong_figures,
    wrong_tables,
)

PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "deploy/**/*.md")
    for p in ROOT.glob(pattern)
    if p.name != "CHANGELOG.md"
)
FOLDERS = "trtllm_memshare|benchmarks|build_scripts|tests|docs|plugins|deploy"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_the_results(page):
    assert not list(wrong_figures(read(page)))


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page):
    assert not list(wrong_tables(read(page)))
    assert not list(wrong_cells(read(page)))


@pytest.mark.parametrize("page", PAGES)
def test_every_reference_is_read(page):
    """A marker with a slip in it would otherwise check nothing."""
    text = read(page)
    understood = sum(len(pattern.findall(text)) for pattern in (FIGURE, ROWS, TABLE))
    assert understood == len(re.findall(r"<!--\s*(?:\w+)?=", text))


def test_the_markers_catch_a_wrong_figure():
    document = {"variants": [{"variant": "a", "accuracy": 0.994}], "rows": [3, 4]}
    assert look_up(document, "variants[variant=a].accuracy") == 0.994
    assert look_up(document, "rows[1]") == 4
    assert look_up({"a.json": {"b": 5}}, "[a.json].b") == 5
    rows = {"rows": [{"a": 1, "b": 2}, {"a": 1, "b": 3}]}
    assert look_up(rows, "rows[a=1][b=3].b") == 3
    assert evaluate("1 - rows[b=2].b / $rows[1].b * 3", rows, rows) == -1
    assert is_shown(0.994, "99.4", True)
    assert not is_shown(0.9946, "99.4", True)
    assert is_shown(12345, "12,345", False)
    assert is_shown(-0.5, "-0.5", False)
    assert is_shown(4.83e-7, "4.8e-07")
    assert not is_shown(4.9e-7, "4.8e-07")
    assert is_shown("42 of 52", "42 of 52")
    assert is_shown(0.0002, "< 0.001")
    assert not is_shown(0.001, "< 0.001")
    assert FIGURE.search("chance (p < 0.001<!--= r.jsonl m:f -->)")["shown"] == "< 0.001"
    assert FIGURE.search("gains 1.15<!--= r.json a.b --> times")["shown"] == "1.15"
    assert FIGURE.search("knows 42 of 52<!--= r.jsonl\nm:f arm=1 --> facts")["shown"] == "42 of 52"


def test_the_markers_catch_a_wrong_cell():
    rows = "benchmarks/results/vllm_schedule.json runs[part=4]"
    marker = f"<!--rows= {rows}\narm: vllm; 0.5 | steps | p50_steps & p99_steps -->"
    head = "\n\n| arm | steps | steps |\n| --- | ---: | ---: |\n"
    right = "| vLLM | 5,931 | 2,902 / 5,782 |\n| half kept | 4,097 | "
    assert [cell for _, cell, _ in wrong_cells(f"{marker}{head}{right}2,047 / 4,097 |")] == ["2,047 / 4,097"]
    with pytest.raises(AssertionError, match="rows are missing"):
        list(wrong_cells(f"{marker}{head}| vLLM | 5,931 | 2,902 / 5,782 |"))
    with pytest.raises(AssertionError, match="the result has a value"):
        list(wrong_cells(f"{marker}{head}| vLLM | - | 2,902 / 5,782 |\n| half | 4,247 | - |"))


TOY = (ROOT / "docs/toy.md").read_text(encoding="utf-8")
REAL_TEXT = (ROOT / "benchmarks/studies/real_text/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "there", "instead", "wrong"),
    [
        (TOY, "      max_aliases=2 ", "      invented    0.0%\n      max_aliases=2 ", ["max_aliases=2"]),
        (TOY, "21.2%   79.3%", "21.2%   79.4%", ["max_distance=1.2"]),
        (TOY, "74.4% to 83.5%\n", "74.4% to 83.5%\n      invented    0.0%\n", ["invented"]),
        (REAL_TEXT, "  | 8 | -0.04", "  | 4 | -0.04 |\n  | 8 | -0.04", ["| 8 |"]),
        (REAL_TEXT, "+0.09 (0.07) |\n", "+0.09 (0.07) |\n  | 4 | 0 |\n", ["| 4 | 0 |"]),
    ],
)
def test_the_markers_catch_a_line_that_nothing_made(text, there, instead, wrong):
    assert not list(wrong_tables(text))
    assert text.count(there) == 1
    lines = [line for _, line in wrong_tables(text.replace(there, instead))]
    assert [line[: len(start)] for line, start in zip(lines, wrong, strict=True)] == wrong


# Figures without a marker, each with the reason why no result holds it.
SETTINGS = "a setting, a default, a threshold or a step of it"
GOAL = "a goal that was set"
VERSION = "a version of software"
SIZE = "the size of a model or a machine"
ARITHMETIC = "what chance or arithmetic gives"
UNREFERRED = {
    "README.md": {"1.85": GOAL},
    "benchmarks/data/trace_model/README.md": {"1.2": SIZE},
    "benchmarks/data/traces/README.md": {"1.94": "counted in the file that it names"},
    "benchmarks/data/traces/qwen3-32b-thinking-aime24/README.md": {"0.6": SETTINGS, "0.95": SETTINGS, "2.0": VERSION},
    "benchmarks/data/traces/r1-distill-qwen1.5b-math/README.md": {"0.8": SETTINGS},
    "benchmarks/studies/distances/README.md": {"0.8": SETTINGS, "0.5": ARITHMETIC},
    "benchmarks/studies/learning_to_copy/README.md": {"1.2": SIZE, "7.6": ARITHMETIC},
    "benchmarks/studies/real_text/README.md": {
        **dict.fromkeys(("0.35", "0.7", "0.9"), SETTINGS),
        **{"1.2": SIZE, "7.6": ARITHMETIC, "0.01": "a unit"},
    },
    "benchmarks/studies/rejected_pairs/README.md": {"0.5": SETTINGS},
    "benchmarks/studies/sweeps/README.md": {"0.9": SETTINGS, "1.2": SETTINGS},
    "docs/architecture.md": dict.fromkeys(("40.2", "30.6"), "lines of code, counted by the command below them"),
    "docs/deploy.md": dict.fromkeys(("2.51", "24.10", "25.07", "3.11", "3.12"), VERSION),
    "docs/gpu.md": {"1.85": GOAL, "10.14": VERSION},
    "docs/method.md": dict.fromkeys(("0.5", "0.7", "0.9"), SETTINGS),
    "docs/null_page.md": {"99.9": SETTINGS},
    "docs/plugins.md": {"10.14": VERSION, "11.1": VERSION},
    "docs/pressure.md": {
        **dict.fromkeys(("0.97", "0.92", "0.5", "0.2", "0.25", "0.75"), SETTINGS),
        **dict.fromkeys(("1.85", "2.2", "1.5", "1.4"), GOAL),
    },
    "docs/pressure_figures.md": {"0.92": SETTINGS, **dict.fromkeys(("1.85", "2.2", "1.5", "1.4"), GOAL)},
    "docs/pytorch_backend.md": {
        **dict.fromkeys(("0.5", "0.97", "0.92"), SETTINGS),
        **{"1.1": VERSION, "1.4": VERSION, "1.5": SIZE, "0.9": SIZE, "3.6": SIZE},
    },
    "docs/pytorch_backend_figures.md": {"0.5": SETTINGS, "1.1": VERSION, "1.2": VERSION, "1.6": GOAL},
    "docs/real_model.md": {"0.1": SETTINGS, "0.9": SETTINGS, "0.8": GOAL, "0.95": GOAL, "2.0": VERSION},
    "docs/real_model_figures.md": {"0.6": SETTINGS, "0.95": SETTINGS, "0.8": GOAL, "0.03": ARITHMETIC},
    "docs/reliability.md": {"4.57": VERSION, "5.24": VERSION, "0.0625": "printed by the test that the row names"},
    "docs/tensorrt_llm.md": {"10.14": VERSION},
    "docs/toy.md": {"0.8": SIZE, "1.2": SIZE, "23.5": SIZE, "1.85": GOAL, "0.6": SETTINGS, "0.95": SETTINGS},
    "docs/vllm.md": {
        **dict.fromkeys(("0.5", "0.97", "0.92"), SETTINGS),
        **dict.fromkeys(("1.5", "1.85", "2.2"), GOAL),
    },
    "docs/vllm_figures.md": {
        **dict.fromkeys(("0.5", "0.25", "0.6", "0.75", "0.62", "0.53"), SETTINGS),
        **dict.fromkeys(("1.5", "1.85", "2.2"), GOAL),
    },
}
UNITS = r"(?:x|[munµ]?s|[kKMG]i?B|h)"  # that stand right behind a figure; a B alone is the size of a model
PRODUCTS = r"(?:Python|TensorRT|TensorRT-LLM|vLLM|nvcc|CUDA|arXiv) \d+\.[\dx.]+(?: (?:to|and|or) \d+\.[\dx]+)?"


def unreferred(text: str) -> set[str]:
    """Decimal figures and ``N of M`` of a page's prose and tables that no marker stands behind."""
    checked = "|".join(pattern.pattern for pattern in (ROWS, TABLE))
    checked = re.sub(r"\(\?P<\w+>", "(?:", checked)
    text = re.sub(rf"(?:{checked})(?:\s|<!--(?!\w*=).*?-->)*(?:^ *\|.*\n)+", "", text, flags=re.MULTILINE)
    text = FIGURE.sub("", text)
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(rf"^ {{4}}.*$|`[^`]*`|\]\([^)]*\)|{PRODUCTS}", "", text, flags=re.MULTILINE)
    return set(re.findall(rf"(?<![\w.])\d+\.\d+(?:e-?\d+)?(?={UNITS}?(?![\w.]*\w))|\d+ of \d+", text))


@pytest.mark.parametrize("page", PAGES)
def test_every_measured_figure_has_its_reference(page):
    assert unreferred(read(page)) == set(UNREFERRED.get(page, ()))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("takes 3.7x as long, 12.5ms, or 0.5 s", {"3.7", "12.5", "0.5"}),
        ("1.5B parameters, release 2.3.4 and 10.14rc1", set()),
        ("right in 9 of 10<!--= r.jsonl m:f --> and 3 of 4", {"3 of 4"}),
        ("5.5 %.", {"5.5"}),
    ],
)
def test_a_figure_is_one_with_its_unit_right_behind_it_too(text, found):
    assert unreferred(text) == found


def test_the_front_door_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page):
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", read(page)):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(((?!https?:|#|mailto:)[^)#]+)", read(page)):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_named_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^ +|`)make ([\w-]+)", read(page), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_empty(page):
    assert len(read(page).split()) > 30
