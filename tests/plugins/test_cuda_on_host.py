"""The host run of kernels finds what a GPU would only sometimes show."""

from __future__ import annotations

import numpy as np
import pytest
from plugins.kernels_on_host import address, compile_for_host

NO_BARRIER, HALF_A_BARRIER, HALF_A_SHUFFLE, UNSET_SHARED = range(4)
_LAUNCH_FAILURE = 719


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return compile_for_host(tmp_path_factory.mktemp("faults"), "faults.cpp")


def run(faults, which: int, backwards: bool = False) -> tuple[int, np.ndarray]:
    out = np.zeros(64, np.int32)
    faults.memshare_run_backwards(int(backwards))
    return faults.memshare_fault(which, address(out)), out


def test_a_missing_barrier_gives_other_results_when_the_threads_run_backwards(faults):
    assert not np.array_equal(run(faults, NO_BARRIER)[1], run(faults, NO_BARRIER, backwards=True)[1])


@pytest.mark.parametrize("which", [HALF_A_BARRIER, HALF_A_SHUFFLE])
def test_threads_that_wait_for_others_in_vain_end_the_launch(faults, which, capfd):
    assert run(faults, which)[0] == _LAUNCH_FAILURE
    assert "threads wait for others that never come" in capfd.readouterr().err
    assert run(faults, UNSET_SHARED)[0] == 0  # the next launch is not touched


def test_shared_memory_holds_rubbish_when_a_block_starts(faults):
    status, out = run(faults, UNSET_SHARED)
    assert status == 0
    assert (out == -1).all()
