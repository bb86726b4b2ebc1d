"""Random schedules over vLLM's real scheduler, with a worker that only keeps block tables and makes tokens up
from the text so far.

The worker follows model runner V1 of vLLM 0.32.0 (``_update_states``): new requests bring their table, running ones
append to it, resumed ones bring it anew, and our update is applied before all that. With async scheduling the next step
is scheduled before the last one's tokens are known.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
from fakes.later_copies import copies, stand_again
from vllm import SamplingParams
from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm_plugin.schedulers import hash_function
from vllm_plugin.shadow import Shadow
from vllm_plugin.step_attention import StepAttention

from trtllm_memshare.vllm.distance_reports import DistanceReports
from trtllm_memshare.vllm.runner_v1 import RunnerV1
from trtllm_memshare.vllm.update import ATTRIBUTE, REPORTS, MemShareUpdate

VOCABULARY = range(2, 60)


class Simulation:
    """One schedule: submits, aborts and steps at random; every read and every floor is checked.

    ``text_of``: the text that a request writes on, by its first token; None = made up from the text so far.
    """

    def __init__(self, scheduler: Any, seed: int, text_of: Callable[[int], list[int]] | None = None) -> None:
        self.scheduler = scheduler
        self.draw, self.text_of = random.Random(seed), text_of
        self._draw_priority = random.Random(f"priority {seed}")  # read with scheduling_policy priority alone
        self.size = scheduler.hash_block_size
        specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
        self.windows, self.full = [getattr(spec, "sliding_window", None) for spec in specs[:-1]], len(specs) - 1
        self.is_aligned = scheduler.cache_config.mamba_cache_mode == "align"
        self.shadow = Shadow(self.size, scheduler.blocks.null_block_ids if hasattr(scheduler, "blocks") else [])
        self.worker = SimpleNamespace(requests={}, input_batch=SimpleNamespace(
            req_id_to_index={}, block_table=[SimpleNamespace(block_table=SimpleNamespace(np=None)) for _ in specs]
        ))  # fmt: skip
        self.sampled: dict[str, dict[int, int]] = {}
        self.answers: list[list[int]] = []  # of requests that ended: later prompts begin with them
        self.prompts: list[list[int]] = []
        self.in_flight: deque[tuple[Any, list[Any]]] = deque()
        self.num_submitted = self.num_steps = self.most_entries = 0
        self.num_below_floor = 0  # looks at a request that had given up more than its floor leaves
        self.most_in_windows = self.num_waiting_counted = 0
        if hasattr(scheduler, "blocks"):
            self._watch_waiting(scheduler.kv_cache_manager)
        self._in_a_row = Counter[str]()  # steps of one token each, by request
        self._outsiders: list[Any] = []
        self.attention = None
        if self._skips():
            most = scheduler.scheduler_config.max_num_seqs, scheduler.max_model_len
            self.attention = StepAttention(scheduler.blocks.null_block_ids, self.size, *most)
        self._reports = DistanceReports(self)  # what it finds nobody reads, unless the need is nearest-earlier
        self._hash = get_request_block_hasher(self.size, hash_function)

    def _skips(self) -> bool:
        settings = getattr(self.scheduler, "settings", None)  # vLLM's own scheduler has none
        return settings is not None and settings.options.null_entries == "skip"

    def submit(self) -> None:
        draw = self.draw
        prompt = [draw.choice(VOCABULARY) for _ in range(draw.randint(1, 60))]
        if self.answers and draw.random() < 0.5:
            prompt = (draw.choice(self.answers)[: draw.randint(1, 150)] + prompt)[:200]
        elif draw.random() < 0.3:
            prompt = [7] * 64 + prompt[:10]
        elif self.prompts and draw.random() < 0.5:
            prompt = draw.choice(self.prompts)  # the same answer again, with other pages retired
        self.prompts.append(prompt)
        extra = draw.choice([None, None, {"min_kept": 0.0}, {"min_kept": 0.8}, {"memshare": False}])
        name = f"r{self.num_submitted}"
        self.num_submitted += 1
        self.add(name, prompt, draw.randint(1, 180), extra)

    def add(self, name: str, prompt: list[int], max_tokens: int, extra: dict[str, Any] | None) -> None:
        """Submits one request."""
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        sampling.update_from_generation_config({}, 1)
        request = Request(
            request_id=name, prompt_token_ids=prompt, sampling_params=sampling, pooling_params=None,
            block_hasher=self._hash if self.scheduler.cache_config.enable_prefix_caching else None,
            priority=self._draw_priority.randint(0, 3),
        )  # fmt: skip
        self.shadow.begin(name)
        self.scheduler.add_request(request)

    def abort(self) -> None:
        if self.scheduler.requests:
            name = self.draw.choice(sorted(self.scheduler.requests))
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def counts(self) -> dict[str, int]:
        """What happened, for the record of all schedules."""
        totals, shadow = self.scheduler.relief.totals, self.shadow
        return {
            "steps": self.num_steps, "requests": self.num_submitted, "retired": totals.retired,
            "retired_repeats": totals.retired_repeats, "retired_aliased": totals.retired_aliased,
            "retired_again": totals.retired_again, "reads": shadow.reads, "null_reads": shadow.null_reads,
            "alias_reads": shadow.alias_reads, "reads_of_others": shadow.reads_of_others,
        }  # fmt: skip

    def step(self) -> None:
        """Schedules one step; runs and takes in the oldest one in flight."""
        self.num_steps += 1
        output = self.scheduler.schedule()
        self.check_references()
        self.check_floors()
        self.check_windows(output.num_scheduled_tokens)
        facts = [self._facts(name, count) for name, count in output.num_scheduled_tokens.items()]
        self.in_flight.append((output, facts))
        depth = 2 if self.scheduler.scheduler_config.async_scheduling else 1
        if len(self.in_flight) >= depth or not output.num_scheduled_tokens:
            self.drain(len(self.in_flight) - depth + 1)

    def check_references(self) -> None:
        """Every block has as many references as there are entries that name it."""
        manager = self.scheduler.kv_cache_manager
        groups = [list(group.req_to_blocks.values()) for group in manager.coordinator.single_type_managers]
        entries = Counter(block.block_id for blocks in (*chain(*groups), self._outsiders) for block in blocks)
        for block in manager.block_pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == entries[block.block_id], f"{block} is named {entries[block.block_id]} times"
        for blocks in groups[self.full]:
            self.most_entries = max([self.most_entries, *Counter(b.block_id for b in blocks if not b.is_null).values()])

    def check_floors(self) -> None:
        """What is missing to a floor stands again in what its request keeps, word for word and later."""
        relief = self.scheduler.relief
        for name, request in self.scheduler.requests.items():
            pages = relief._pages.get(name)
            if pages is None:  # its options could not be used
                continue
            full = pages.num_full(request.num_computed_tokens)
            missing = math.ceil(pages.options.min_kept * full - 1e-9) - (full - pages.num_retired)
            if missing > 0:
                tokens = list(request.all_token_ids)[: request.num_computed_tokens]
                is_kept = ~np.isin(np.arange(len(tokens)) // self.size, pages.retired)
                found = stand_again(copies(tokens, relief._config.min_run_tokens), is_kept)
                standing = [p for p in pages.retired if found[p * self.size : (p + 1) * self.size].all()]
                assert len(standing) >= missing, f"{name} is below its floor: of {pages.retired} {standing} stand again"
                self.num_below_floor += 1

    def _watch_waiting(self, manager: Any) -> None:
        """What is to be made free for who waits is what vLLM counts, but for windows that a long text never fills."""
        scheduler, allocate = self.scheduler, manager.allocate_slots

        def watched(request: Request, num_new: int, **keywords: Any) -> Any:
            before, scheduler._wanted_by_waiting = scheduler._wanted_by_waiting, 0
            blocks = allocate(request, num_new, **keywords)
            if blocks is None and scheduler._wanted_by_waiting:
                computed = request.num_computed_tokens + keywords.get("num_new_computed_tokens", 0)
                end = min(max(request.num_tokens, request.num_computed_tokens + num_new), scheduler.max_model_len)
                hits, wanted, more = keywords["new_computed_blocks"].blocks, manager.watermark_blocks, 0
                for index, group in enumerate(manager.coordinator.single_type_managers):
                    count = group.get_num_blocks_to_allocate(
                        request.request_id, end, hits[index], computed, computed, end
                    )
                    if count > scheduler.blocks.num_blocks:  # it waits until a hit of this very step is there
                        return blocks
                    unused = sum(block.ref_cnt == 0 and not block.is_null for block in hits[index])
                    most = group.max_admission_blocks_per_request
                    wanted += count if most is None else min(count - unused, most) + unused
                    more += getattr(group.kv_cache_spec, "num_prefill_checkpoint_blocks", 0)  # not of every prompt
                assert wanted <= scheduler._wanted_by_waiting <= wanted + more
                self.num_waiting_counted += 1
            else:
                scheduler._wanted_by_waiting = before
            return blocks

        manager.allocate_slots = watched

    def check_windows(self, num_scheduled: dict[str, int]) -> None:
        """Who has generated for some steps holds no more in windows and states than admission counts."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers[: self.full]
        for name, request in self.scheduler.requests.items():
            is_one_more = num_scheduled.get(name) == 1
            self._in_a_row[name] = self._in_a_row[name] + 1 if is_one_more else 0
            held = sum(not block.is_null for manager in managers for block in manager.req_to_blocks.get(name, ()))
            if self._in_a_row[name] > 3:
                goes_on = self.is_aligned and request.num_computed_tokens % self.size in (1, 2)  # in the next block
                twice = len(managers) if goes_on else 0
                assert held - twice <= self.scheduler.blocks.others.most_held(request.num_tokens + 2)
                self.most_in_windows = max(self.most_in_windows, held)

    @contextmanager
    def outsiders(self, blocks: list[Any]) -> Iterator[None]:
        """While it lasts, somebody else holds these."""
        self._outsiders = blocks
        yield
        self._outsiders = []

    def distances(self, new_blocks: list[int], old_blocks: list[int]) -> np.ndarray:
        """Any, of blocks that may be compared: no block twice, and no null page."""
        assert len(set(old_blocks)) == len(old_blocks), f"compared twice: {old_blocks}"
        assert set(new_blocks) <= set(old_blocks)
        assert not set(old_blocks) & set(self.scheduler.blocks.null_block_ids), f"a null page is compared: {old_blocks}"
        draw = np.random.default_rng(self.draw.randrange(2**32))
        return draw.random((len(new_blocks), len(old_blocks)), np.float32)

    def drain(self, count: int) -> None:
        """Runs the oldest ``count`` steps in flight."""
        for _ in range(count):
            output, facts = self.in_flight.popleft()
            result = self._execute(output, facts)
            before = dict(self.scheduler.requests)
            self.scheduler.update_from_output(output, result)
            for name in before.keys() - self.scheduler.requests.keys():
                self.answers.append(list(before[name].all_token_ids))

    def _facts(self, name: str, count: int) -> Any:
        request = self.scheduler.requests[name]
        stop = request.num_computed_tokens  # advanced by the step that was just scheduled
        return SimpleNamespace(
            name=name, start=stop - count, stop=stop, tokens=list(request.all_token_ids),
            partial=request.is_prefill_chunk, **self._retired(name),
        )  # fmt: skip

    def _retired(self, name: str) -> dict[str, Any]:
        relief = getattr(self.scheduler, "relief", None)  # vLLM's own scheduler has none
        if relief is None:
            return {"retired": set(), "aliased": {}}
        pages = relief.pages(name)
        return {"retired": set(pages.retired), "aliased": dict(pages.aliased)}

    def _execute(self, output: Any, facts: list[Any]) -> ModelRunnerOutput:
        requests = self.worker.requests
        update = getattr(output, ATTRIBUTE, MemShareUpdate())
        runner = RunnerV1(self.worker, "0.32", self.full)
        reports = self._reports.answer(update, runner.tables(update.asked), output.finished_req_ids)
        runner.apply(update)
        for name in output.finished_req_ids:
            requests.pop(name, None)
        for new in output.scheduled_new_reqs:
            requests[new.req_id] = SimpleNamespace(block_ids=new.block_ids)
            self.sampled[new.req_id] = {}
        cached = output.scheduled_cached_reqs
        for name, new_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                requests[name].block_ids = new_ids
                self.sampled[name] = {}
            elif new_ids is not None:
                for table, ids in zip(requests[name].block_ids, new_ids, strict=True):
                    table.extend(ids)
        if self.attention is not None:
            self.attention.follow(update.null_entries, output.finished_req_ids)
            self.attention.check([(requests[fact.name].block_ids[self.full], fact.stop) for fact in facts])
        names, sampled = [], []
        for fact in facts:
            made = self.sampled[fact.name]
            tokens = fact.tokens + [made[p] for p in range(len(fact.tokens), fact.stop)]
            *others, table = requests[fact.name].block_ids
            self._check_band(fact, table)
            states = [blocks for window, blocks in zip(self.windows, others, strict=True) if window is None]
            if not self.is_aligned:
                assert all(len(blocks) == 1 for blocks in states)
                states = []  # in one block for as long as their request runs
            windows = tuple(pair for pair in zip(self.windows, others, strict=True) if pair[0] is not None)
            self.shadow.step(
                fact.name, tokens, fact.start, fact.stop, table, fact.retired, fact.aliased, windows, states,
                self._checkpoint(fact),
            )  # fmt: skip
            names.append(fact.name)
            # Greedy: by the text alone.
            made_up = VOCABULARY[self.shadow.prefix(fact.name, fact.stop) % len(VOCABULARY)]
            token = made_up if self.text_of is None else self.text_of(tokens[0])[fact.stop]
            if not fact.partial:
                made[fact.stop] = token
            sampled.append([] if fact.partial else [token])
        result = ModelRunnerOutput(
            req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=sampled
        )  # fmt: skip
        setattr(result, REPORTS, reports)
        return result

    def _checkpoint(self, fact: Any) -> tuple[int, int] | None:
        """Tokens after which a kernel keeps one more state in this step, and the logical block that gets it."""
        alignment = getattr(
            self.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec, "prefill_checkpoint_alignment", None
        )
        offsets, blocks = compute_mamba_prefill_checkpoints(
            [fact.stop], [fact.stop - fact.start], self.size, self.size, alignment, False, self.size
        )
        return (fact.start + offsets[0], blocks[0]) if blocks[0] >= 0 else None

    def _check_band(self, fact: Any, table: list[int]) -> None:
        """All queries of a step are in the band of positions that the null pages they meet are made for."""
        forgotten = fact.retired - fact.aliased.keys()
        if forgotten:
            relief, ids = self.scheduler.relief, self.scheduler.blocks.null_block_ids
            bands = {relief._band(position) for position in (fact.start, fact.stop - 1)}
            named = {ids.index(table[page]) for page in forgotten}
            assert named == bands, f"{fact.name}: queries {fact.start} to {fact.stop} meet null pages of bands {named}"

    def plain_steps(self, count: int) -> list[dict[str, int]]:
        """What is scheduled in ``count`` steps, one request joining before each of the first ten."""
        steps = []
        for index in range(count):
            if index < 10:
                self.submit()
            steps.append(self.plain_step())
        return steps

    def plain_step(self) -> dict[str, int]:
        """One step of any scheduler, vLLM's own too; what was scheduled."""
        output = self.scheduler.schedule()
        self.in_flight.append((output, [self._facts(n, c) for n, c in output.num_scheduled_tokens.items()]))
        self.drain(1)
        return dict(output.num_scheduled_tokens)

    def finish(self) -> None:
        """Runs to the end and checks that nothing is left."""
        for _ in range(20000):
            if not self.scheduler.requests and not self.in_flight:
                break
            if self.scheduler.requests:
                self.step()
            else:
                self.drain(len(self.in_flight))
        scheduler = self.scheduler
        assert not scheduler.requests, f"{len(scheduler.requests)} requests never ended"
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks, "blocks leaked"
        pool = scheduler.kv_cache_manager.block_pool
        held = [b.block_id for b in pool.blocks if b.ref_cnt and not b.is_null]
        assert held == [], f"blocks {held} are still referenced"
        assert scheduler.relief.totals.null_entries == scheduler.relief.totals.aliased_entries == 0
        assert scheduler.reset_prefix_cache(), "vLLM does not find its pool idle"


def run_schedule(scheduler: Any, seed: int, text_of: Callable[[int], list[int]] | None = None) -> Simulation:
    """One random schedule from an idle scheduler to an idle scheduler."""
    simulation = Simulation(scheduler, seed, text_of)
    for _ in range(simulation.draw.randint(20, 400)):
        chance = simulation.draw.random()
        if chance < 0.4 and len(scheduler.requests) < 24:
            simulation.submit()
        elif chance < 0.42:
            simulation.abort()
        elif chance < 0.425:
            simulation.drain(len(simulation.in_flight))
            scheduler.reset_prefix_cache(reset_running_requests=True)
        else:
            simulation.step()
    simulation.finish()
    return simulation
