"""Block tables of vLLM's two model runners follow an update by request id."""

from types import SimpleNamespace

import numpy as np

from trtllm_memshare.vllm.update import MemShareUpdate, apply_to_v1_runner, apply_to_v2_runner


def test_an_update_keeps_the_last_word_on_an_entry():
    update = MemShareUpdate()
    update.set("a", 3, 1)
    update.set("a", 3, 2)
    update.set("b", 0, 1)
    update.keep_only({"a"})
    assert update.null_entries == {"a": {3: 2}}


def test_runner_v1_changes_the_request_and_its_row_wherever_that_is_now():
    table = np.arange(24).reshape(3, 8)
    runner = SimpleNamespace(
        requests={n: SimpleNamespace(block_ids=([10, 11, 12, 13],)) for n in ("a", "b", "paused")},
        input_batch=SimpleNamespace(
            req_id_to_index={"a": 2, "b": 0}, block_table=[SimpleNamespace(block_table=SimpleNamespace(np=table))]
        ),
    )
    update = MemShareUpdate(null_entries={"a": {1: 99}, "paused": {2: 98}, "ended": {0: 97}})
    before = table.copy()
    apply_to_v1_runner(runner, update)
    before[2, 1] = 99
    np.testing.assert_array_equal(table, before)
    assert runner.requests["a"].block_ids[0] == [10, 99, 12, 13]
    assert runner.requests["paused"].block_ids[0] == [10, 11, 98, 13]
    assert runner.requests["b"].block_ids[0] == [10, 11, 12, 13]


def test_runner_v1_waits_for_the_copy_of_the_step_before():
    """As vLLM does before it writes rows itself (``synchronize_input_prep`` of vLLM 0.32, read on 28 November 2026)."""
    table, seen = np.arange(8).reshape(1, 8), []
    runner = SimpleNamespace(
        prepare_inputs_event=SimpleNamespace(synchronize=lambda: seen.append(table.copy())),
        requests={"a": SimpleNamespace(block_ids=([0, 1],))},
        input_batch=SimpleNamespace(
            req_id_to_index={"a": 0}, block_table=[SimpleNamespace(block_table=SimpleNamespace(np=table))]
        ),
    )
    apply_to_v1_runner(runner, MemShareUpdate(null_entries={"a": {1: 99}}))
    assert [before.tolist() for before in seen] == [[list(range(8))]]
    assert table[0, 1] == 99


def test_runner_v2_stages_writes_to_the_requests_row():
    staged = []
    runner = SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={"a": 5}),
        block_tables=SimpleNamespace(block_tables=[SimpleNamespace(stage_write=lambda *w: staged.append(w))]),
    )
    apply_to_v2_runner(runner, MemShareUpdate(null_entries={"a": {1: 99, 4: 98}, "ended": {0: 97}}))
    assert staged == [(5, 1, [99]), (5, 4, [98])]
