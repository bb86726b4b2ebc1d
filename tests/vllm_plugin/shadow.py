"""An oracle for schedules: keeps whose text was written into each block of the pool, and checks every read.

A token is known by the hash of everything up to it, so two requests with one prefix write the same. A slot is *exact*
if it was computed while nothing that it reads was retired or inexact; only exact slots may be read by another request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    prefix: int  # hash of the request's tokens up to this one
    writer: int  # a number for each request that ever ran
    exact: bool  # and so are the slots before it in the block


class Shadow:
    """The pool of one scheduler, block by block. A block's owner writes it from its first slot on."""

    def __init__(self, block_size: int, null_block_ids: Sequence[int]) -> None:
        self._size = block_size
        self._null = set(null_block_ids)
        self._blocks: dict[int, list[Slot]] = {}
        self._writers: dict[str, int] = {}
        self._prefixes: dict[str, list[int]] = {}  # hash of the tokens up to each position
        self.reads = self.reads_of_others = self.null_reads = self.alias_reads = self.window_reads = (
            self.state_reads
        ) = self.checkpoints = 0

    def begin(self, request_id: str) -> None:
        """A request begins."""
        self._writers[request_id] = len(self._writers)
        self._prefixes[request_id] = []

    def prefix(self, request_id: str, num_tokens: int) -> int:
        """Hash of a request's first ``num_tokens`` tokens."""
        return self._prefixes[request_id][num_tokens - 1]

    def step(
        self,
        request_id: str,
        tokens: Sequence[int],
        start: int,
        stop: int,
        table: Sequence[int],
        retired: set[int],
        aliased: Mapping[int, int],
        windows: Sequence[tuple[int, Sequence[int]]] = (),
        states: Sequence[Sequence[int]] = (),
        checkpoint: tuple[int, int] | None = None,
    ) -> None:
        """One request's part of a step: it reads ``[0, start)`` and computes ``[start, stop)``.

        Args:
          tokens: its tokens, at least ``stop``.
          table: block ids by logical block, as the worker holds them.
          retired: its logical blocks that are retired, as the scheduler sees them.
          aliased: the earlier logical block that is read in place of each of those that are not forgotten.
          windows: tokens that a query sees, its own among them, and block ids, of each group of sliding windows.
          states: block ids of each group of states that go on in a new block wherever one ends.
          checkpoint: tokens in ``(start, stop)`` whose state is kept too, and the logical block that gets it.
        """
        assert aliased.keys() <= retired, f"an alias that is not retired: {request_id} {dict(aliased)} {retired}"
        there = [block for logical, block in enumerate(table[: -(-stop // self._size)]) if logical not in retired]
        assert len(set(there)) == len(there), f"one block twice without an alias: {request_id} {list(table)}"
        prefixes = self._prefixes[request_id]
        for position in range(len(prefixes), stop):
            prefixes.append(hash((prefixes[-1] if prefixes else 0, tokens[position])))
        exact = True
        for logical in range(-(-stop // self._size)):
            first, block = logical * self._size, table[logical]
            where = f"{request_id} block {block} (logical {logical}), {start} to {stop}"
            is_null = logical in retired and logical not in aliased
            assert (block in self._null) == is_null, f"null entry and retirement differ: {where}"
            if logical in aliased:
                exact = self._read_alias(request_id, logical, aliased[logical], table, retired, where)
            elif first < start:
                exact = self._read(request_id, block, prefixes[min(start, first + self._size) - 1], where) and exact
            for position in range(max(start, first), min(stop, first + self._size)):
                self._write(request_id, block, position - first, prefixes[position], exact, where)
        for group, (window, blocks) in enumerate(windows, 1):
            self._step_in_window(request_id, group, window, blocks, start, stop, exact)
        for group, blocks in enumerate(states, 1):
            ends = {stop: (stop - 1) // self._size} | ({} if checkpoint is None else {checkpoint[0]: checkpoint[1]})
            self._step_of_state(request_id, group, blocks, start, ends, exact)

    def _step_of_state(
        self, request_id: str, group: int, table: Sequence[int], start: int, ends: Mapping[int, int], exact: bool
    ) -> None:
        """The same of a group of states: the one after ``start`` tokens goes on.

        Args:
          ends: the logical blocks in which the states after so many tokens are kept.
          exact: whether all that full attention has read is.
        """
        prefixes, where = self._prefixes[request_id], f"{request_id} states {group}, {start} to {dict(ends)}"
        if start:
            before = table[(start - 1) // self._size]
            exact = self._read(request_id, before, hash((-group, prefixes[start - 1])), where) and exact
            self.state_reads += 1
        self.checkpoints += len(ends) - 1
        for end, logical in ends.items():
            assert table[logical] not in self._null, f"a state written into a null page: {where}"
            slot = Slot(hash((-group, prefixes[end - 1])), self._writers[request_id], exact)
            self._blocks[table[logical]] = [slot]

    def _step_in_window(
        self, request_id: str, group: int, window: int, table: Sequence[int], start: int, stop: int, exact: bool
    ) -> None:
        """The same of a group of sliding windows, whose blocks are of the same pool.

        Args:
          exact: whether all that full attention has read is.
        """
        prefixes = [hash((group, prefix)) for prefix in self._prefixes[request_id][:stop]]
        for logical in range(max(0, start + 1 - window) // self._size, -(-stop // self._size)):
            first, block = logical * self._size, table[logical]
            where = f"{request_id} block {block} (logical {logical} of window {group}), {start} to {stop}"
            assert block not in self._null, f"a null page in a window: {where}"
            if first < start:
                exact = self._read(request_id, block, prefixes[min(start, first + self._size) - 1], where) and exact
                self.window_reads += 1
            for position in range(max(start, first), min(stop, first + self._size)):
                self._write(request_id, block, position - first, prefixes[position], exact, where)

    def _read_alias(
        self, request_id: str, logical: int, donor: int, table: Sequence[int], retired: set[int], where: str
    ) -> bool:
        """Checks that an alias is a full earlier block of its request which is there; nothing after it is exact."""
        assert donor < logical, f"an alias of a later block {donor}: {where}"
        assert donor not in retired, f"an alias of {donor}, which is retired: {where}"
        assert table[donor] == table[logical], f"an alias of {donor}, which is block {table[donor]}: {where}"
        self._read(request_id, table[logical], self.prefix(request_id, (donor + 1) * self._size), where)
        self.alias_reads += 1
        return False

    def _read(self, request_id: str, block: int, prefix: int, where: str) -> bool:
        """Checks that a block holds the text with this hash; returns whether it is exact."""
        if block in self._null:
            self.null_reads += 1
            return False
        slot = next((s for s in reversed(self._blocks.get(block, [])) if s.prefix == prefix), None)
        assert slot is not None, f"read what another text has written, or nothing: {where}"
        own = slot.writer == self._writers[request_id]
        assert slot.exact or own, f"read what another request computed with gaps: {where}"
        self.reads += 1
        self.reads_of_others += not own
        return slot.exact

    def _write(self, request_id: str, block: int, offset: int, prefix: int, exact: bool, where: str) -> None:
        assert block not in self._null, f"written into a null page: {where}"
        slots = self._blocks.setdefault(block, [])
        del slots[offset:]
        assert len(slots) == offset, f"written behind a gap: {where}"
        slots.append(Slot(prefix, self._writers[request_id], exact and (not slots or slots[-1].exact)))
