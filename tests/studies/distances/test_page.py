"""benchmarks/studies/distances/README.md prints what the reports hold and names what exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.studies.distances.distances import QUANTITIES, VOTES
from benchmarks.studies.distances.tables import MEASURES, count_confirmed, count_different

ROOT = Path(__file__).resolve().parents[3]
REPORTS = ("distance_study", "distance_study_traces")
STUDY = ROOT / "benchmarks" / "studies" / "distances"
PAGE = (STUDY / "README.md").read_text()


def micro(harm):
    return f"{1e6 * harm:.2g}" if harm < 1e-4 else f"{1e6 * harm:.0f}"


def span(low, high, form):
    return f"{low:{form}} to {high:{form}}"


def ranking(group, measure):
    return lambda r, name: f"{r['groups'][group]['definitions'][name][measure]['value']:.2f}"


def gain(group, measure):
    return lambda r, n: span(*r["groups"][group]["definitions"][n][measure]["gain_interval"], "+.3f")


def accepted(group, share):
    return lambda r, name: micro(r["groups"][group]["definitions"][name]["accepted"][share]["harm"])


def ratio(group, share):
    return lambda r, n: span(*r["groups"][group]["definitions"][n]["accepted"][share]["ratio_interval"], ".2g")


CELLS = {
    "number": lambda r, kind: str(r["kinds"][kind]["pairs"]),
    **{f"distance {q}": lambda r, kind, q=q: f"{r['kinds'][kind]['distance'][q]:.2f}" for q in ("p10", "p50", "p90")},
    **{f"harm {q}": lambda r, kind, q=q: micro(r["kinds"][kind]["harm"][q]) for q in ("p10", "p50", "p90", "p99")},
    "largest": lambda r, kind: micro(r["kinds"][kind]["harm"]["p100"]),
    "mean": lambda r, kind: micro(r["kinds"][kind]["mean_harm"]),
    "mean, V alone": lambda r, kind: micro(r["kinds"][kind]["mean_harm_of_values"]),
    "rank, all": ranking("all", "rank_correlation"),
    "AUC, all": ranking("all", "auc"),
    "less the default's": gain("all", "auc"),
    "AUC, near+similar": ranking("near+similar", "auc"),
    "less the default's there": gain("near+similar", "auc"),
    **{f"all, {s} %": accepted("all", s) for s in ("25", "50", "75")},
    "ratio at 75 %": ratio("all", "75"),
    **{f"near+similar, {s} %": accepted("near+similar", s) for s in ("25", "50", "75")},
    "ratio there": ratio("near+similar", "75"),
}


def tables() -> Iterator[tuple[dict, list[str], list[list[str]]]]:
    """(report, header cells, rows) of each table, under the last line before it that names a report."""
    named, lines = "", PAGE.splitlines()
    for index, line in enumerate(lines):
        found = re.match(r"`(benchmarks/studies/distances/results/[\w.]+\.json)`", line)
        named = found[1] if found else named
        if line.startswith("|") and not lines[index - 1].startswith("|"):
            stop = next((i for i in range(index, len(lines)) if not lines[i].startswith("|")), len(lines))
            rows = [[c.strip() for c in row.strip("|").split("|")] for row in lines[index:stop]]
            yield json.loads((ROOT / named).read_text()), rows[0], rows[2:]


def test_every_cell_is_what_its_report_holds():
    seen = 0
    for report, header, rows in tables():
        for name, *cells in rows:
            for title, cell in zip(header[1:], cells, strict=True):
                assert cell == CELLS[title](report, name.strip("`")), (report["texts"], name, title)
                seen += 1
    assert seen > 100


def test_the_numbers_in_the_text_are_those_of_the_reports():
    text = " ".join(PAGE.split())
    toy, traces = (json.loads((STUDY / "results" / f"{name}.json").read_text()) for name in REPORTS)
    groups = [toy["groups"][name] for name in ("all", "near+similar")]
    assert f"first {toy['num_texts']} tuning problems" in text
    assert f"{groups[0]['pairs']:,} pairs of {groups[0]['texts']} problems" in text
    assert f"hundredth of the pairs makes {100 * groups[0]['top_percent_share']:.0f} % of all harm" in text
    assert f"hundredth makes {100 * traces['groups']['all']['top_percent_share']:.0f} % of it all" in text
    assert traces["groups"]["all"]["texts"] == 5
    for group in ("all", "near+similar"):
        for measure in MEASURES:
            better, worse, total = count_different(toy, group, measure)
            assert f"{better} of {total} lie above and {worse} below" in text, (group, measure)
    won = [count_confirmed(toy, group) for group in ("all", "near+similar")]
    assert f"{won[0][0]} figures (all kinds) and {won[1][0]} (near and similar) beat the default" in text
    assert f"on the other half {won[0][1]} and {won[1][1]} of them do so again" in text
    (won_all, again_all), (won_near, again_near) = (count_confirmed(traces, g) for g in ("all", "near+similar"))
    assert (
        f"{won_all} (all kinds) and {won_near} (near and similar) beat the default's, {again_all} and {again_near}"
        in text
    )
    halves = [
        [half["K and V, worst"]["auc"]["value"] for half in (r["groups"]["near+similar"]["definitions"], again)]
        for r in (traces, toy)
        for again in (r["again"]["near+similar"],)
    ]
    assert "AUC is {:.2f} on the five judged texts and {:.2f} on the other five".format(*halves[0]) in text
    assert "the two halves agree: {:.2f} and {:.2f}".format(*halves[1]) in text
    repeat = traces["kinds"]["repeat"]
    assert repeat["pairs"] == 2
    assert f"does {1e6 * repeat['mean_harm_of_values']:.1f} millionths" in text
    assert f"the whole block does {1e6 * repeat['mean_harm']:.0f}" in text
    low = [d["K quarter 4, worst"]["accepted"]["25"] for d in (groups[0]["definitions"], toy["again"]["all"])]
    assert "a fifth less harm" in text
    assert [round(1 - a["ratio"], 2) for a in low] == [0.2, 0.14]
    assert "({} and {})".format(*(a["ratio_interval"][1] for a in low)) in text
    learned = traces["learned"].values()
    assert not any(weight for entry in learned for row in entry["weights"] for weight in row)


def test_paths_and_definitions_exist():
    for path in re.findall(r"`((?:benchmarks|trtllm_memshare|docs|tests)/[\w./]+)`", PAGE):
        assert (ROOT / path).exists(), path
    for quantity, vote in re.findall(r"`([\w ]+), (\w+)`", PAGE):
        assert quantity in QUANTITIES, quantity
        assert vote in {*VOTES, "pooled"}, vote
