"""Admission: who may join."""

from types import SimpleNamespace

import pytest
from fakes.vllm_blocks import BLOCK_SIZE, Host

from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.relief_faults import ReliefFaults
from trtllm_memshare.vllm.admission import FloorAdmission
from trtllm_memshare.vllm.groups import OtherGroups
from trtllm_memshare.vllm.request_options import RequestOptions
from trtllm_memshare.vllm.update import MemShareUpdate


def request(name, tokens, max_tokens, prompt=8):
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=prompt,
        num_computed_tokens=tokens - 1 if tokens > prompt else 0,
        num_tokens=tokens,
        max_tokens=max_tokens,
        resumable=False,
    )


def admits(waiting, running, min_kept, admission, config, num_blocks, memshare=True, num_retired=0, windows=()):
    """Of requests in which nothing stands again."""
    options = RequestOptions(memshare, min_kept)
    pages = SimpleNamespace(num_retired=num_retired, options=options, num_full=lambda num_computed: 0)
    relief = SimpleNamespace(pages=lambda name: pages, givable=lambda request: ([], set()), faults=ReliefFaults())
    managers = [SimpleNamespace(block_size=4, sliding_window=window) for window in windows]
    blocks = SimpleNamespace(
        num_blocks=num_blocks, block_size=4, longest_request_tokens=4096, others=OtherGroups(managers),
        num_shared=lambda prompts, hits: [0] * len(prompts),
    )  # fmt: skip
    return FloorAdmission(relief, blocks, config, admission).admits(waiting, running)


def settings(lookahead=16, **changes):
    return make_config("pressure", **{"lookahead_tokens": lookahead, "protected_tokens": 0, **changes})


def joins(running, min_kept, num_blocks, admission="max-tokens", lookahead=16, memshare=True, **changes):
    waiting, config = request("b", 8, 40), settings(lookahead, **changes)
    return admits(waiting, running, min_kept, admission, config, num_blocks, memshare)


def test_a_request_joins_when_the_pool_holds_everybody_at_the_floor():
    running = [request("a", 8, 40)]
    assert not joins(running, 1.0, 23)  # 12 blocks each at the end
    assert joins(running, 1.0, 24)
    assert joins(running, 0.25, 12)  # 2 of prompt, 3 of 10 generated, the one being written
    assert not joins(running, 0.25, 11)
    assert not joins(running, 0.25, 12, memshare=False)  # who shares nothing keeps everything


def test_who_ends_before_the_others_have_grown_leaves_them_room():
    """Both at their longest are 24 blocks of 4. Once the first one writes, it ends before the second has grown."""
    for tokens, num_blocks in ((8, 24), (20, 12 + 9), (36, 12 + 5), (46, 12 + 3)):
        running = [request("a", tokens, 40)]
        assert joins(running, 1.0, num_blocks)
        assert not joins(running, 1.0, num_blocks - 1)
    assert joins([request("a", 36, 40, prompt=36)], 1.0, 9 + 10 + 12)  # it computes its prompt, and may be late
    assert not joins([request("a", 36, 40, prompt=36)], 1.0, 9 + 10 + 11)


def test_pages_that_went_below_a_floor_leave_room():
    """Four pages of each stood again and went: no floor brings them back."""
    running, waiting = [request("a", 8, 40)], request("b", 8, 40)
    assert admits(waiting, running, 1.0, "max-tokens", settings(), 16, num_retired=4)
    assert not admits(waiting, running, 1.0, "max-tokens", settings(), 15, num_retired=4)


def test_nobody_is_counted_beyond_the_longest_request_that_there_can_be():
    """Offline vLLM lets a request ask for more tokens than the model can write."""
    running, waiting = [request("a", 8, 10**9)], request("b", 8, 10**9)
    assert admits(waiting, running, 1.0, "max-tokens", settings(), 2 * 1024)
    assert not admits(waiting, running, 1.0, "max-tokens", settings(), 2 * 1024 - 1)


@pytest.mark.parametrize("admission", ["lookahead", "max-tokens"])
def test_windows_are_counted_beside_pages_and_grow_no_longer_than_they_are(admission):
    """A window of 9 tokens lies in 4 blocks of 4 at most, two steps in flight among them; one of 400 grows on."""
    running, waiting = [request("a", 8, 40)], request("b", 8, 40)
    for windows, held in ((), 0), ((9,), 4), ((9, 400), 4 + 12):
        needed = 2 * (12 + held)
        assert admits(waiting, running, 1.0, admission, settings(40), needed, windows=windows)
        assert not admits(waiting, running, 1.0, admission, settings(40), needed - 1, windows=windows)


def test_what_steps_may_protect_is_counted_as_recent_tokens_are():
    running, steps = [request("a", 8, 400)], {"protected_steps": 2, "max_protected_tokens": 16}
    by_steps = [joins(running, 0.0, blocks, **steps) for blocks in range(40)]
    assert by_steps == [joins(running, 0.0, blocks, protected_tokens=16) for blocks in range(40)]
    assert by_steps.index(True) == [joins(running, 0.0, blocks) for blocks in range(40)].index(True) + 8


@pytest.mark.parametrize(("lookahead", "num_blocks"), [(4, 6), (16, 12), (400, 24)])
def test_lookahead_counts_the_next_tokens_and_no_more_than_were_asked_for(lookahead, num_blocks):
    running = [request("a", 8, 40)]
    assert joins(running, 1.0, num_blocks, "lookahead", lookahead)
    assert not joins(running, 1.0, num_blocks - 1, "lookahead", lookahead)


def test_somebody_always_gets_on_and_vllms_own_rule_asks_nothing():
    assert joins([], 1.0, 1)
    assert joins([request("a", 8, 400)], 1.0, 1, "vllm")


def least_pool(host, admission, waiting, running, hits):
    """Blocks of the smallest pool that lets it in."""
    sizes = range(1, 60)
    rule, joins = FloorAdmission(host.relief, host.blocks, host.config, admission), []
    for host.blocks.num_blocks in sizes:
        joins.append(rule.admits(waiting, running, hits))
        rule.admits(waiting, [])  # and it is asked anew
    return sizes[joins.index(True)]


def beside_two_that_share(lookahead=16):
    """A and B of 17 tokens share a prompt of four pages, and will be 24 and 56 tokens long."""
    host = Host(60, longest=232, lookahead_tokens=lookahead, min_kept=1.0)
    running = [host.add(name, 16, 17) for name in "ab"]
    a, b = (host.table(name) for name in "ab")
    host.manager.block_pool.touch(a)
    host.manager.block_pool.free_blocks(b)
    b[:] = a
    for one, max_tokens in zip(running, (8, 40), strict=True):
        one.max_tokens = max_tokens
    waiting = request("c", 16, 4, prompt=16)
    host.relief.add("c", 16, RequestOptions(True, 1.0))
    return host, waiting, running, [a]


def test_a_prompt_that_several_share_is_counted_once():
    host, waiting, running, hits = beside_two_that_share()
    assert least_pool(host, "lookahead", waiting, running, [[]]) == 6 + 9 + 5 - 4  # its own copy would be a second one
    assert least_pool(host, "lookahead", waiting, running, hits) == 6 + 9 + 5 - 8
    assert least_pool(host, "lookahead", waiting, running[:1], hits) == 6 + 5 - 4


def test_a_session_that_waits_for_its_next_chunk_counts_as_those_that_run_do():
    host, waiting, running, hits = beside_two_that_share()
    admission = FloorAdmission(host.relief, host.blocks, host.config, "lookahead")
    for host.blocks.num_blocks, joins in ((6 + 9 + 5 - 8, True), (6 + 9 + 5 - 9, False)):
        assert admission.admits(waiting, running[:1], hits, paused=running[1:]) == joins
    assert admission.admits(waiting, [], hits, paused=running), "nobody would ever get on"


def test_a_shared_prompt_stays_until_the_last_that_shares_it_ends():
    """With A and B there 17 pages less eight that are there once; when A has ended, B's 14 and C's five less four."""
    host, waiting, running, hits = beside_two_that_share()
    for order in (running, running[::-1]):
        assert least_pool(host, "max-tokens", waiting, order, hits) == 14 + 5 - 4


def test_generated_pages_that_are_anothers_prompt_are_counted_with_both():
    """Their writer gives none of them up, whatever its floor says."""
    host = Host(60, longest=232)
    host.add("a", 16, 25)
    table = host.table("a")
    host.manager.block_pool.touch(table)
    host.table("d")[:] = table
    assert host.blocks.num_shared([("a", 16), ("d", 24)]) == [0, 4]
    assert host.blocks.num_shared([("d", 24), ("a", 16)]) == [0, 4]


def test_what_one_alone_holds_so_far_is_shared_with_who_hits_it():
    host = Host(60, longest=232)
    host.add("a", 16, 25)
    assert host.blocks.num_shared([("c", 16), ("a", 16)], [host.table("a")[:3]]) == [0, 3]
    assert host.blocks.num_shared([("c", 16), ("a", 16)], [[]]) == [0, 0]


def test_who_was_refused_is_asked_again_once_it_finds_more_in_the_prefix_cache():
    host, waiting, running, hits = beside_two_that_share()
    host.blocks.num_blocks, rule = 12, FloorAdmission(host.relief, host.blocks, host.config, "lookahead")
    assert not rule.admits(waiting, running, [[]])
    assert rule.admits(waiting, running, hits)


PHRASE = list(range(60, 72))  # three pages


def in_a_loop(memshare=True, **config):
    """58 blocks, and request "a" that has said one phrase twelve times: 38 pages, of which it needs a handful."""
    host = Host(60, longest=232, lookahead_tokens=4, **config)
    running = host.add("a", 4, 8, RequestOptions(memshare, 1.0))
    running.max_tokens = 1000
    for _ in range(12):
        host.grow(running, PHRASE)
    return host, running


def waiting_for(host, name, num_pages):
    """One that would fill so many pages within the lookahead."""
    num_tokens = num_pages * BLOCK_SIZE
    host.relief.add(name, num_tokens - 4, RequestOptions(True, 1.0))
    return request(name, num_tokens - 4, 4, prompt=num_tokens - 4)


def admission_of(host):
    return FloorAdmission(host.relief, host.blocks, host.config, "lookahead")


def test_a_request_in_a_loop_holds_little_and_another_gets_in():
    host, running = in_a_loop()
    # Of 39 pages with the lookahead's 7 stay: two of before, the last four, since the newest token is not computed yet,
    # and the lookahead's.
    assert admission_of(host).admits(waiting_for(host, "b", 58 - 7), [running])
    assert not admission_of(host).admits(waiting_for(host, "c", 58 - 6), [running])
    freed = host.relief.make_room([running], host.blocks.num_free + 100, MemShareUpdate())
    assert 39 - freed == 7, "what admission counts on does not go"


@pytest.mark.parametrize("kept", [{"memshare": False}, {"need": "nearest-earlier"}])
def test_a_loop_lets_nobody_in_where_repeats_do_not_go_first(kept):
    host, running = in_a_loop(**kept)
    assert admission_of(host).admits(waiting_for(host, "b", 58 - 39), [running])
    assert not admission_of(host).admits(waiting_for(host, "c", 58 - 38), [running])


def test_repeats_are_looked_for_once_a_page(monkeypatch):
    host, running = in_a_loop()
    admission, looks, givable = admission_of(host), [], host.relief.givable
    monkeypatch.setattr(host.relief, "givable", lambda request: looks.append(request.request_id) or givable(request))
    waiting = [waiting_for(host, name, 58) for name in "bcd"]
    for one in waiting:
        assert not admission.admits(one, [running])
    assert looks.count("a") == 1
    host.grow(running, [1, 2, 3, 4])
    assert not admission.admits(waiting[0], [running])
    assert looks.count("a") == 2
    host.relief.lose_blocks("a")
    admission.forget("a")
    assert not admission.admits(waiting[1], [running])
    assert looks.count("a") == 3


def test_who_was_refused_is_asked_again_after_a_page_or_when_somebody_has_gone():
    host, running = in_a_loop(memshare=False)
    other = host.add("other", 4, 8)
    admission, waiting = admission_of(host), waiting_for(host, "b", 58 - 38)
    assert not admission.admits(waiting, [running, other])
    host.relief.pages("a").retired = list(range(2, 12))
    assert [admission.admits(waiting, [running, other]) for _ in range(BLOCK_SIZE + 1)] == [False] * BLOCK_SIZE + [True]
    host.relief.pages("a").retired = []
    assert not admission.admits(waiting, [running, other])
    host.relief.pages("a").retired = list(range(2, 12))
    assert admission.admits(waiting, [running])
