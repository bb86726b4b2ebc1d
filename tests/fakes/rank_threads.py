"""Ranks that are threads of one process, over a stand-in for mpi4py's communicator."""

from __future__ import annotations

import threading

from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.trtllm.pytorch.attach import MpiCommunicator


class FakeMpi:
    """mpi4py's communicator between threads."""

    def __init__(self, rank, slots, barrier):
        self._rank, self._slots, self._barrier = rank, slots, barrier

    def Get_rank(self):
        return self._rank

    def Get_size(self):
        return len(self._slots)

    def gather(self, value, root):
        values = self._exchange(value)
        return values if self._rank == root else None

    def bcast(self, value, root):
        return self._exchange(value)[root]

    def _exchange(self, value):
        self._slots[self._rank] = value
        self._barrier.wait(30)
        values = list(self._slots)
        self._barrier.wait(30)
        return values


def on_ranks(count, work):
    """What ``work(agreement, rank)`` returned, or raised, on every rank."""
    slots, barrier, results = [None] * count, threading.Barrier(count), [None] * count

    def run(rank):
        try:
            results[rank] = work(RankAgreement(MpiCommunicator(FakeMpi(rank, slots, barrier)), count), rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results
