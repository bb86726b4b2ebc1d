"""Block tables of vLLM's two model runners follow an update by request id, and can be read."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm_plugin.fake_runners import FakeRunnerV1, FakeRunnerV2

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.model_runner import open_runner
from trtllm_memshare.vllm.update import MemShareUpdate


def test_an_update_keeps_the_last_word_on_an_entry():
    update = MemShareUpdate()
    update.set("a", 3, 1)
    update.set("a", 3, 2)
    update.set("b", 0, 1)
    update.keep_only({"a"})
    assert update.null_entries == {"a": {3: 2}}


def test_runner_v1_changes_the_request_and_its_row_wherever_that_is_now():
    runner = FakeRunnerV1(**{name: [10, 11, 12, 13] for name in ("a", "b", "paused")})
    runner.input_batch.req_id_to_index = {"a": 2, "b": 0}
    table = runner.input_batch.block_table[0].block_table.np
    table[:] = np.arange(64).reshape(8, 8)
    update = MemShareUpdate(null_entries={"a": {1: 99}, "paused": {2: 98}, "ended": {0: 97}})
    before = table.copy()
    open_runner(runner, "0.32").apply(update)
    before[2, 1] = 99
    np.testing.assert_array_equal(table, before)
    assert runner.requests["a"].block_ids[0] == [10, 99, 12, 13]
    assert runner.requests["paused"].block_ids[0] == [10, 11, 98, 13]
    assert runner.requests["b"].block_ids[0] == [10, 11, 12, 13]


def test_runner_v1_waits_for_the_copy_of_the_step_before():
    """As vLLM does before it writes rows itself (``synchronize_input_prep`` of vLLM 0.32, read on 28 November 2026)."""
    runner, seen = FakeRunnerV1(a=[0, 1]), []
    runner.input_batch.req_id_to_index = {"a": 0}
    table = runner.input_batch.block_table[0].block_table.np
    runner.prepare_inputs_event = SimpleNamespace(synchronize=lambda: seen.append(table.copy()))
    open_runner(runner, "0.32").apply(MemShareUpdate(null_entries={"a": {1: 99}}))
    assert not np.any(seen[0])
    assert table[0, 1] == 99


def test_runner_v2_stages_writes_to_the_requests_row():
    runner = FakeRunnerV2(a=[10, 11, 12, 13, 14], b=[20])
    open_runner(runner, "0.32").apply(MemShareUpdate(null_entries={"b": {0: 99, 4: 98}, "ended": {0: 97}}))
    assert runner.staged == [(3, 0, [99]), (3, 4, [98])]


@pytest.mark.parametrize("fake", [FakeRunnerV1, FakeRunnerV2])
def test_tables_are_those_of_the_requests_that_are_here(fake):
    runner = open_runner(fake(a=[10, 11], b=[20, 21, 22], c=[30]), "0.32")
    tables = runner.tables(["c", "gone", "b"])
    assert {name: table[:1].tolist() for name, table in tables.items()} == {"c": [30], "b": [20]}
    assert tables["b"][[0, 2]].tolist() == [20, 22]
    assert runner.tables(["gone"]) == {}


def test_a_model_runner_of_neither_form_is_refused():
    with pytest.raises(UserError, match="keeps its block tables in a form that MemShare does not know"):
        open_runner(SimpleNamespace(), "0.40")
