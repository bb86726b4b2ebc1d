"""Committed inputs, drawn ones and guided ones for every parser, in every test run; see ``run.py`` for hours of it."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from fuzz.run import fuzz
from fuzz.targets import NAMES, run_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
GUIDED_INPUTS = 1000
DIGITS = "stands for an integer of 5,000 digits"
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([DIGITS, "\ud800", "x" * 3000, 2**31, -1, 1e308, "4"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def seeds(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_parser_has_a_corpus_with_inputs_that_it_takes(name):
    taken = [run_target(name, data) for data in seeds(name)]
    assert any(taken)
    assert name in ("setting", "tensors") or not all(taken)


def _write(value: object) -> str:
    """JSON with what Python's writer refuses."""
    if value == DIGITS:
        return "1" * 5000
    if isinstance(value, bool) or value is None or isinstance(value, float | str):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_write, value)) + "]"
    assert isinstance(value, dict)
    return "{" + ",".join(f"{json.dumps(k)}:{_write(v)}" for k, v in value.items()) + "}"


@pytest.mark.parametrize("name", sorted(NAMES))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_changed_inputs_are_taken_or_refused_with_a_sentence(name, data):
    """One place of a committed input becomes another value, or a few bytes become others."""
    seed = data.draw(st.sampled_from(seeds(name)))
    try:
        document = json.loads(seed)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and document and data.draw(st.booleans()):
        place = document
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(_VALUES)
        changed = _write(document).encode("utf-8", "surrogatepass")
    else:
        start, stop = sorted((data.draw(st.integers(0, len(seed))), data.draw(st.integers(0, len(seed)))))
        changed = seed[:start] + data.draw(st.binary(max_size=12)) + seed[stop:]
    run_target(name, changed)


@pytest.fixture(scope="module")
def guided() -> dict[str, dict[str, object]]:
    """What became of the inputs that coverage leads to, by target."""
    pytest.importorskip("atheris", reason="atheris is for Linux and Python 3.11 or later")
    return {str(row["target"]): row for row in fuzz(sorted(NAMES), f"-runs={GUIDED_INPUTS}")}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_inputs_that_coverage_leads_to_are_taken_or_refused_with_a_sentence(guided, name):
    row = guided[name]
    assert not row["failed"], row
    assert int(str(row["inputs"])) >= GUIDED_INPUTS
    assert int(str(row["coverage"])) > 10  # the parser was instrumented


HEAVY = {
    "nested": b"[" * 2_000_000,
    "nested objects": b'{"a":' * 400_000,
    "digits": b'{"task_id": ' + b"9" * 2_000_000 + b"}",
    "one long line": b'{"task_id": 1, "output_tokens": 1, "prompt": "' + b"a" * 17_000_000 + b'"}',
    "one long key": b'{"' + b"k" * 4_000_000 + b'": 1}',
    "many keys": b"{" + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}",
    "exponent": b'{"task_id": 1e999999999, "rope_theta": 1e999999999}',
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_heavy_inputs_take_bounded_time_and_memory(name):
    tracemalloc.start()
    try:
        for what, data in HEAVY.items():
            started = time.process_time()
            run_target(name, data)
            assert time.process_time() - started < 10, what  # 2 s by itself; tracing takes four times as long
        assert tracemalloc.get_traced_memory()[1] < 500 * 2**20
    finally:
        tracemalloc.stop()
