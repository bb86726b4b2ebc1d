"""Runners with one fault each: the stand-in engine must catch every one of them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from fakes.fake_tensorrt import ContractError

from trtllm_memshare.runners.tensorrt.runner import TensorRTRunner
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.failures import RequestFailedError
from trtllm_memshare.serving.request import SamplingParams


class Mutated(TensorRTRunner):
    """Changes the batch before it is packed."""

    def prepare(self, batch):
        offsets = self.change(batch.block_offsets.copy(), batch)
        return super().prepare(replace(batch, block_offsets=offsets))


class OffsetOffByOne(Mutated):
    def change(self, offsets, batch):
        offsets[0, 0, :, 0] += 1
        return offsets


class OffsetOffByOneBlock(Mutated):
    def change(self, offsets, batch):
        if batch.num_contexts == 0:
            offsets[0, -1, :, 0] += 2 * self.num_layers
        return offsets


class KAndVSwapped(Mutated):
    def change(self, offsets, batch):
        return offsets[:, :, ::-1]


class FreedBlock(Mutated):
    """One request goes on with the table that it had before its blocks were given to another."""

    def change(self, offsets, batch):
        if len(batch.chunk_lengths) > 1:
            offsets[0, 1, :, 0] = offsets[0, 0, :, 0]
        return offsets


class UnwrittenBlock(Mutated):
    """A context request reads blocks that only a later step will fill."""

    def change(self, offsets, batch):
        if batch.num_contexts == 0:
            offsets[0, 0, :, 0] = (self.num_blocks - 1) * 2 * self.num_layers + np.arange(2)
        return offsets


class StaleHostTensor(TensorRTRunner):
    """Host inputs of the step before."""

    def prepare(self, batch):
        inputs = super().prepare(batch)
        view = self._staging.host_view(inputs.packed, "host_past_key_value_lengths")
        before, self.kept = getattr(self, "kept", None), view.copy()
        if before is not None and before.shape == view.shape:
            view[:] = before
        return inputs


class FreedHostTensor(TensorRTRunner):
    """Drops an input that the engine still has the address of."""

    def prepare(self, batch):
        inputs = super().prepare(batch)
        fixed = self._bindings._fixed
        address = fixed["host_runtime_perf_knobs"].data_ptr()
        fixed["host_runtime_perf_knobs"] = type("Gone", (), {"data_ptr": lambda _: address})()
        return inputs


class HostTensorOnTheDevice(TensorRTRunner):
    def prepare(self, batch):
        fixed = self._bindings._fixed
        fixed["host_sink_token_length"] = self._device.device_tensor((1,), fixed["host_sink_token_length"].dtype)
        return super().prepare(batch)


class PromptLengthForgotten(TensorRTRunner):
    """Says of a generation request that all of it came as context, as after a pause that never was."""

    def prepare(self, batch):
        lengths = np.where(np.arange(len(batch.chunk_lengths)) >= batch.num_contexts, 2, batch.context_lengths)
        return super().prepare(replace(batch, context_lengths=lengths.astype(np.int32)))


class PositionsOffByOne(TensorRTRunner):
    def prepare(self, batch):
        return super().prepare(replace(batch, position_ids=batch.position_ids + 1))


class NotUploaded(TensorRTRunner):
    """Copies nothing to the device in every third step."""

    def step(self, inputs):
        self.count = getattr(self, "count", 0) + 1
        if self.count % 3 == 0:
            inputs = replace(inputs, packed=replace(inputs.packed, num_copied=0))
        return super().step(inputs)


MUTATIONS = [
    OffsetOffByOne,
    OffsetOffByOneBlock,
    KAndVSwapped,
    FreedBlock,
    UnwrittenBlock,
    StaleHostTensor,
    FreedHostTensor,
    HostTensorOnTheDevice,
    PromptLengthForgotten,
    PositionsOffByOne,
    NotUploaded,
]


def drive(runner, boundaries, prompts):
    executor = Executor(runner, make_config("aligned", protected_tokens=16), boundaries, 1024, 4, 64)
    handles = [executor.submit(p, SamplingParams(12)) for p in prompts[:3]]
    executor.run_until_idle()
    return [h.result(0).token_ids for h in handles]


def broken_contract(serve) -> ContractError:
    """What the stand-in engine found: it ends the requests of a step, and after three such steps the executor."""
    with pytest.raises((ContractError, RequestFailedError)) as raised:
        serve()
    error = raised.value if isinstance(raised.value, ContractError) else raised.value.__cause__
    assert isinstance(error, ContractError)
    return error


def test_without_a_fault_nothing_is_caught(make_runner, bundled_model, boundaries, prompts):
    assert all(len(t) == 12 for t in drive(make_runner(bundled_model), boundaries, prompts))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_fault_is_caught(make_runner, bundled_model, boundaries, prompts, mutation):
    runner = make_runner(bundled_model, runner_class=mutation)
    broken_contract(lambda: drive(runner, boundaries, prompts))


class RemapForgotten(TensorRTRunner):
    """Reads a block on after sharing has freed it: the table of a request keeps the entries it once had."""

    def prepare(self, batch):
        self.tables = getattr(self, "tables", {})
        offsets = batch.block_offsets.copy()
        for row in range(batch.num_contexts, offsets.shape[1]):
            first, length = int(offsets[0, row, 0, 0]), int(batch.sequence_lengths[row])
            used = (length - 1) // self.tokens_per_block  # the last block is still being written
            known = self.tables.get(first)
            if known is not None and known[0] < length:
                width = min(known[1].shape[1], used)
                offsets[0, row, :, :width] = known[1][:, :width]
            self.tables[first] = length, offsets[0, row, :, :used].copy()
        return super().prepare(replace(batch, block_offsets=offsets))


def test_a_block_that_is_read_after_it_was_freed_is_caught(make_runner, bundled_model, boundaries, prompts):
    """Its next owner writes to it while this request still names it."""
    config = make_config("lexical", protected_tokens=16, protected_steps=0, search_interval=1)

    def serve(runner):
        executor = Executor(runner, config, boundaries, 1024, 4, 64)
        handles = [executor.submit(prompt, SamplingParams(230)) for prompt in prompts[:3]]
        executor.run_until_idle()
        for handle in handles:
            handle.result(0)
        return executor.manager.stats().shared

    assert serve(make_runner(bundled_model, 70)) > 0
    error = broken_contract(lambda: serve(make_runner(bundled_model, 70, runner_class=RemapForgotten)))
    assert re.search(r"named more than once|nobody wrote", str(error))
