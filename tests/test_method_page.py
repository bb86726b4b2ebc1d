"""docs/method.md names what exists and prints what the reports hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "method.md").read_text()

CELLS = {
    "right %": lambda e: f"{100 * e['free']['accuracy']:.1f}",
    "lost / gained": lambda e: "{lost} / {gained}".format(**e["paired"]["full"]),
    "p to aligned": lambda e: f"{e['paired']['aligned']['p_value']:.2g}",
    "KL mnat": lambda e: f"{1000 * e['replay']['kl_nats']:.3f}",
    "±": lambda e: f"{1000 * e['replay']['kl_standard_error']:.3f}",
    "perplexity": lambda e: f"{e['replay']['perplexity']:.5f}",
    "saved %": lambda e: f"{100 * e['replay']['memory_saved']:.1f}",
    "shared %": lambda e: f"{100 * e['replay']['shared_block_fraction']:.1f}",
}


def tables():
    """(report, header cells, rows) of each table under a line that names its report."""
    pattern = r"^`(benchmarks/results/[\w.]+\.json)`.*:\n\n((?:\|.*\|\n)+)"
    for path, text in re.findall(pattern, PAGE, flags=re.MULTILINE):
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
        yield json.loads((ROOT / path).read_text()), rows[0], rows[2:]


def test_every_cell_is_what_its_report_holds():
    seen = 0
    for report, header, rows in tables():
        entries = {entry["arm"]: entry for entry in report["arms"]}
        for name, *cells in rows:
            for title, cell in zip(header[1:], cells, strict=True):
                if cell != "-":
                    assert cell == CELLS[title](entries[name.strip("`")]), (report["dataset"], name, title)
                    seen += 1
    assert seen > 50


def test_blocks_in_phase_are_what_the_count_found():
    report = json.loads((ROOT / "benchmarks/studies/in_phase/results/in_phase.json").read_text())
    table = PAGE.partition("| texts | tokens per block |")[2].partition("\n\n")[0].splitlines()[2:]
    expected = [
        [f"`{r['texts']}`", str(r["tokens_per_block"])]
        + [f"{100 * r[key]:.2f}" for key in ("in_phase", "memory_of_v_alone", "aligned")]
        for r in report["rows"]
    ]
    assert [[c.strip() for c in line.strip("|").split("|")] for line in table] == expected


def test_samples_where_memory_binds():
    report = json.loads((ROOT / "benchmarks/studies/sweeps/results/sweep_samples.json").read_text())
    full, request, group = report["rows"]
    assert full["accuracy"] == request["accuracy"] == group["accuracy"]
    text = (
        f"take {full['num_steps']:,} steps and {full['paused_requests']} pauses with the full cache, "
        f"{request['num_steps']:,} and {request['paused_requests']} with `scope: request`, {group['num_steps']:,} and "
        f"{group['paused_requests']} with `scope: group`, {100 * full['accuracy']:.1f} % right"
    )
    assert text in " ".join(PAGE.split())


def test_paths_and_variants_exist():
    for path in re.findall(r"`((?:benchmarks|trtllm_memshare|docs)/[\w./]+)`", PAGE):
        assert (ROOT / path).exists(), path
