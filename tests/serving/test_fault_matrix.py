"""The fault matrix: every field of a caller at its extremes, and every way in which a step can go wrong.

In each cell two other requests run. They must end with their tokens, within a bound of steps; the executor must not
call itself failed; its blocks must come back. The table is ``tests/request_extremes.py``, for other surfaces too.

``pressed``: the pool is too small for what runs, and requests give up pages by the default ranking while it happens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fakes.counting_runner import CountingRunner, expected
from request_extremes import BAD, GOOD, GREEDY

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving import pressure
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.failures import RequestFailedError
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.serving.sampling import Sampler

OTHERS = ([5], [20, 21, 22])
MAX_STEPS = 600
OFF = make_config("off")
PRESSED = make_config("pressure", protected_tokens=4, high_watermark=0.9, low_watermark=0.8, min_kept=0.25)


class ShortRunner(CountingRunner):
    """The same with a pool that shows V, which redundancy reads, of small and few pages."""

    tokens_per_block, skips_entries, null_pages = 4, True, None

    def __init__(self) -> None:
        super().__init__(num_blocks=14)
        rng = torch.Generator().manual_seed(0)
        self.pool = torch.randn(self.num_blocks, 1, 2, 1, self.tokens_per_block, 4, generator=rng)

    def reserve_null_pages(self, are_used) -> None:
        pass


@pytest.fixture(params=[False, True], ids=["room", "pressed"])
def pressed(request) -> bool:
    return request.param


class Matrix:
    """An executor with two requests in flight, and the check that nothing happened to them."""

    def __init__(self, boundaries, sampler: Sampler | None = None, pressed: bool = False) -> None:
        self.runner = ShortRunner() if pressed else CountingRunner()
        self.new_tokens = 32 if pressed else 12
        self.executor = Executor(
            self.runner, PRESSED if pressed else OFF, boundaries, 512, max_batch_size=4, sampler=sampler  # type: ignore[arg-type]
        )  # fmt: skip
        self.others = [self.executor.submit(prompt, SamplingParams(self.new_tokens)) for prompt in OTHERS]
        for _ in range(16 if pressed else 1):
            self.executor.step()

    def submit(self, name: str, value: object):
        arguments = {"input_ids": [40], "params": SamplingParams(20, temperature=0.5)}
        if name in ("input_ids", "group", "listener"):
            arguments[name] = value
        else:
            most = 256 if self.executor.pressure is None else 20
            value = most if (name, value) == ("min_new_tokens", 256) else value
            arguments["params"] = SamplingParams(**{"max_new_tokens": most, "temperature": 0.5, name: value})
        return self.executor.submit(**arguments)  # type: ignore[arg-type]

    def assert_others_unharmed(self) -> None:
        for _ in range(MAX_STEPS):
            if not self.executor.has_work:
                break
            self.executor.step()
        assert not self.executor.has_work
        assert [h.result(0).token_ids for h in self.others] == [expected(p, self.new_tokens) for p in OTHERS]
        self.assert_clean()

    def assert_clean(self) -> None:
        assert not self.executor.has_failed
        self.executor.manager.check_integrity()
        assert self.executor.manager.pool.num_used == 0
        assert not self.executor._sampler._generators
        pressure = self.executor.pressure
        assert pressure is None or sum(pressure.stats.retired_pages.values()) > 0


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{place}" for place, (name, _) in enumerate(BAD)])
def test_a_value_that_is_refused_harms_nobody(boundaries, name, value):
    matrix = Matrix(boundaries)
    with pytest.raises(UserError):
        matrix.submit(name, value)
    matrix.assert_others_unharmed()


def test_values_that_are_refused_under_pressure_harm_nobody(boundaries):
    matrix = Matrix(boundaries, pressed=True)
    for place, (name, value) in enumerate(BAD):
        with pytest.raises(UserError):
            matrix.submit(name, value)
        if place % 20 == 0:
            matrix.executor.step()
    matrix.assert_others_unharmed()


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_the_last_value_that_is_taken_runs_to_an_end(boundaries, pressed, name, value):
    matrix = Matrix(boundaries, pressed=pressed)
    handle = matrix.submit(name, value)
    matrix.assert_others_unharmed()
    assert handle.result(0).finish_reason in ("length", "stop")


@pytest.mark.parametrize("changes", GREEDY)
def test_greedy_by_any_name(boundaries, pressed, changes):
    matrix = Matrix(boundaries, pressed=pressed)
    handle = matrix.executor.submit([40], SamplingParams(**{"max_new_tokens": 9, "temperature": 0.9, **changes}))
    matrix.assert_others_unharmed()
    assert handle.result(0).token_ids == expected([40], 9)


def _spoil(value: float, whole_row: bool) -> Callable:
    """The victim counts from 40 on: its last token less its length is 39."""

    def change(batch, logits):
        lasts = batch.input_ids[batch.chunk_lengths.cumsum() - 1]
        for row in np.flatnonzero(lasts - batch.sequence_lengths == 39):
            logits[row, slice(None) if whole_row else 7] = value

    return change


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 0.5, "top_k": 5},
        {"temperature": 0.5, "top_p": 0.5},
        {"bad_words": ((3,),)},
        {"repetition_penalty": 1.5},
        {"log_probs": True},
        {"min_new_tokens": 5, "stop_token_ids": (41,)},
    ],
)
def test_logits_of_one_row(boundaries, pressed, value, whole_row, options):
    matrix = Matrix(boundaries, pressed=pressed)
    matrix.runner.change_logits = _spoil(value, whole_row)
    handle = matrix.executor.submit([40], SamplingParams(10, **options))
    matrix.assert_others_unharmed()
    if value == -torch.inf and not whole_row:
        assert handle.result(0).finish_reason in ("length", "stop")  # a mask is no fault
    else:
        with pytest.raises(RequestFailedError, match="logits that are not finite"):
            handle.result(0)


class Raising(Sampler):
    """Raises for seed 13."""

    def __init__(self, error: Exception, where: str) -> None:
        super().__init__()
        self._error, self._where = error, where

    def _shape(self, row, request):
        if self._where == "shape" and request.params.seed == 13:
            raise self._error
        return super()._shape(row, request)

    def _uniform(self, request):
        if self._where == "sample" and request.params.seed == 13:
            raise self._error
        return super()._uniform(request)


ERRORS = [
    ValueError("x"),
    MemoryError(),
    RuntimeError("CUDA error"),
    KeyError(3),
    IndexError(),
    OverflowError(),
    OSError(),
]


@pytest.mark.parametrize("where", ["shape", "sample"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_errors_in_the_sampler(boundaries, pressed, error, where):
    matrix = Matrix(boundaries, Raising(error, where), pressed)
    handle = matrix.executor.submit([40], SamplingParams(10, temperature=0.5, seed=13, presence_penalty=0.1))
    matrix.assert_others_unharmed()
    with pytest.raises(RequestFailedError, match=type(error).__name__):
        handle.result(0)


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_errors_in_a_listener(boundaries, pressed, error, call):
    matrix, calls = Matrix(boundaries, pressed=pressed), []

    def listener(ended: bool) -> None:
        calls.append(ended)
        if len(calls) == call:
            raise error

    handle = matrix.executor.submit([40], SamplingParams(10), listener=listener)
    matrix.assert_others_unharmed()
    with pytest.raises(RequestFailedError, match=type(error).__name__):
        handle.result(0)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_errors_while_a_request_is_added(boundaries, pressed, error, monkeypatch):
    matrix = Matrix(boundaries, pressed=pressed)
    extend = matrix.executor.manager._extend

    def fail(sequence, num_tokens):
        extend(sequence, num_tokens)
        if sequence.request_id == 2:
            raise error
        return True

    with monkeypatch.context() as patch:
        patch.setattr(matrix.executor.manager, "_extend", fail)
        handle = matrix.executor.submit([40], SamplingParams(10))
        for _ in range(MAX_STEPS):
            matrix.executor.step()
            if handle.future.done():
                break
    matrix.assert_others_unharmed()
    with pytest.raises(RequestFailedError, match=type(error).__name__):
        handle.result(0)


@pytest.mark.parametrize("how", ["handle", "future", "before", "twice", "late"])
def test_cancelling_at_any_time(boundaries, pressed, how):
    matrix = Matrix(boundaries, pressed=pressed)
    handle = matrix.executor.submit([40], SamplingParams(60 if pressed else 300))
    if how != "before":
        matrix.executor.step()
    for _ in range(2 if how == "twice" else 1):
        (handle.future.cancel if how == "future" else handle.cancel)()
    matrix.assert_others_unharmed()
    assert handle.result(0).finish_reason == "cancelled"
    assert handle.result(0).token_ids == expected([40], 300)[: len(handle.result(0).token_ids)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_errors_of_a_step_end_its_batch_and_those_who_wait_go_on(boundaries, error):
    matrix = Matrix(boundaries)
    waiting = [matrix.executor.submit([40 + i], SamplingParams(5)) for i in range(4)]  # two find a place

    def fail(batch):
        matrix.runner.before_step = lambda batch: None
        raise error

    matrix.runner.before_step = fail
    matrix.executor.run_until_idle()
    for handle in (*matrix.others, *waiting[:2]):
        with pytest.raises(RequestFailedError, match=type(error).__name__):
            handle.result(0)
    assert [h.result(0).token_ids for h in waiting[2:]] == [expected([42], 5), expected([43], 5)]
    assert matrix.executor.manager.pool.num_used == 0
    assert (matrix.executor.status().num_failed, matrix.executor.status().num_failed_steps) == (4, 1)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_errors_of_a_step_under_pressure_free_what_its_batch_held(boundaries, error):
    matrix = Matrix(boundaries, pressed=True)
    waiting = [matrix.executor.submit([40 + i], SamplingParams(20)) for i in range(6)]

    def fail(batch):
        matrix.runner.before_step = lambda batch: None
        raise error

    matrix.runner.before_step = fail
    matrix.executor.run_until_idle()
    failed = [h for h in (*matrix.others, *waiting) if h.future.exception(0) is not None]
    assert set(matrix.others) <= set(failed)
    assert len(failed) == matrix.executor.status().num_failed < 6
    for place, handle in enumerate(waiting):
        if handle not in failed:
            assert handle.result(0).token_ids == expected([40 + place], 20)
    matrix.assert_clean()


PARTS = {
    "stage 1": lambda executor: (executor.manager, "givable_pages"),
    "signatures": lambda executor: (executor.pressure._ledger._source._signer, "page_signatures"),
    "facts": lambda executor: (executor.pressure._ledger, "facts"),
    "the choice": lambda executor: (pressure, "choose_pages"),
    "admission": lambda executor: (executor.pressure._admission, "fits"),
    "surprisal": lambda executor: (executor.pressure._ledger, "observe_tokens"),
    "what has gone": lambda executor: (executor.pressure._ledger, "retired"),
}
OF_RELIEF = [*ERRORS, torch.OutOfMemoryError("CUDA out of memory")]


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("error", OF_RELIEF, ids=lambda e: type(e).__name__)
def test_errors_of_pressure_itself_end_nobody(boundaries, error, part, lasts, monkeypatch, caplog):
    matrix, failed = Matrix(boundaries, pressed=True), 0
    handles = [matrix.executor.submit([40 + i], SamplingParams(20)) for i in range(3)]
    while not sum(matrix.executor.pressure.stats.retired_pages.values()):
        matrix.executor.step()
    holder, name = PARTS[part](matrix.executor)
    works = getattr(holder, name)

    def fail(*arguments):
        nonlocal failed
        if failed and not lasts:
            return works(*arguments)
        failed += 1
        raise error

    monkeypatch.setattr(holder, name, fail)
    matrix.assert_others_unharmed()
    assert [h.result(0).token_ids for h in handles] == [expected([40 + i], 20) for i in range(3)]
    status = matrix.executor.status()
    assert status.pressure.num_failed_reliefs == failed > 0
    assert (status.num_failed, status.num_failed_steps) == (0, 0)
    (line,) = [json.loads(r.message) for r in caplog.records if r.levelno == logging.ERROR]
    assert (line["event"], line["error"].partition(":")[0]) == ("relief_failed", type(error).__name__)


def test_the_matrix_has_at_least_four_hundred_cells_and_two_hundred_under_pressure():
    both = len(GOOD) + len(GREEDY) + 2 * 3 * 8 + 2 * len(ERRORS) + 3 * len(ERRORS) + len(ERRORS) + 5
    of_relief = 2 * len(PARTS) * len(OF_RELIEF)
    assert len(BAD) + both + len(ERRORS) + of_relief >= 400
    assert both + len(ERRORS) + of_relief >= 200
