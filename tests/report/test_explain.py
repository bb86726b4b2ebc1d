"""The page about one answer: what it says is what the cache did, and nothing in it comes from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from trtllm_memshare.__main__ import main
from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.evaluation.story import BlockStory, Fate, Story
from trtllm_memshare.report.explain import explain
from trtllm_memshare.report.explain_page import render
from trtllm_memshare.report.explain_words import describe_story
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving import pressure

PROMPT = "Q: 372 + 323 + 6 + 19 = ?\n"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Ids, links and the text of each block of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self._block, self._quiet = "", 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named[k] for k in ("href", "data-donor") if k in named]
        self.sources += [named[k] for k in ("src", "srcset", "action") if k in named]
        if "block" in named.get("class", "").split() and "id" in named:
            self._block = named["id"]
            self.texts[self._block] = ""
        elif named.get("class") in ("tag", "step"):
            self._quiet += 1

    def handle_endtag(self, tag):
        if tag in ("span", "i") and self._quiet:
            self._quiet -= 1
        elif tag in ("span", "a"):
            self._block = ""

    def handle_data(self, data):
        if self._block and not self._quiet:
            self.texts[self._block] += data


@pytest.fixture(scope="module")
def engine(bundled_model, tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("explain") / "engine"
    return build_engine(plan_build(BuildOptions(bundled_model, folder, memshare=True, preset="aligned")))


@pytest.fixture(scope="module")
def story(engine) -> Story:
    return explain(engine, engine.memshare, PROMPT, 2048, "cpu")


@pytest.fixture(scope="module")
def html(engine, story) -> str:
    return render(story, engine.memshare, engine.bytes_per_block)


def test_the_story_agrees_with_the_memory_that_was_counted(story):
    """Blocks given back at the end = table entries less blocks held at the last step; that is the pool's own count."""
    assert story.finish_reason == "stop"
    _, held, logical = story.memory[-1]
    assert story.freed == logical - held > 10
    assert len(story.blocks) == logical
    assert all(m[1] <= m[2] for m in story.memory)


def test_donors_stay_and_list_the_blocks_that_read_them(story):
    for block in story.blocks:
        if block.fate is Fate.SHARED:
            donor = story.blocks[block.donor]
            assert donor.fate is Fate.DONOR
            assert block.index in donor.readers
            assert 0 <= block.distance <= 0.5
            assert block.given_up_at >= (block.index + 1) * story.tokens_per_block
        else:
            assert block.donor is None
            assert bool(block.readers) == (block.fate is Fate.DONOR)
    assert story.blocks[0].fate is Fate.PROMPT
    assert story.blocks[-1].fate is Fate.PROTECTED


def test_the_text_of_the_blocks_is_the_prompt_and_the_answer(story):
    whole = "".join(piece for block in story.blocks for piece in block.pieces)
    assert whole.startswith(PROMPT)
    assert whole.rstrip().endswith("</think>\n720")
    steps = sum(sum(b.step_starts) for b in story.blocks)
    assert steps == len([line for line in whole.removeprefix(PROMPT).splitlines() if line])


def test_every_block_is_on_the_page_once_with_its_text(story, html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert page.texts == {f"b{b.index}": "".join(b.pieces) for b in story.blocks}


def test_links_and_arcs_join_what_is_on_the_page(story, html):
    page = Page(html)
    shared = [b for b in story.blocks if b.donor is not None]
    assert sorted(page.links) == sorted([f"#b{b.donor}" for b in shared] + [f"b{b.donor}" for b in shared])
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert [i for i in page.ids if i.startswith("arc-")] == [f"arc-b{b.index}" for b in shared]


def test_nothing_is_loaded_from_outside(html):
    page = Page(html)
    assert not page.sources
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert set(re.findall(r"https?://[^\"' )]+", html)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "url(" not in html.replace("url(#tip)", "")


def test_text_is_escaped_wherever_it_stands():
    nasty = "</span><script>alert(1)</script>\"'&"
    blocks = (
        BlockStory(0, Fate.PROMPT, (nasty,), (False,)),
        BlockStory(1, Fate.SHARED, (nasty,), (True,), 2, (), 0.25, 40),
        BlockStory(2, Fate.DONOR, (nasty,), (False,), None, (1,)),
    )
    story = Story(nasty, blocks, 16, ((16, 1, 1), (17, 2, 3)), "length", 16, 30, False, {}, {"drift": 2})
    html = render(story, make_config("aligned"), 1024)
    assert html.count("<script") == 1
    assert Page(html).texts == {f"b{i}": nasty for i in range(3)}
    assert "another text" in html
    assert "keeps the newer block, lets the older place point to it" in html
    assert "keeps the older block" in render(story, make_config("paper"), 1024)
    assert "Pairs turned down: 2 drift" in html


def test_an_answer_without_repeats_says_so(engine):
    story = explain(engine, engine.memshare, PROMPT, 40, "cpu")
    html = render(story, engine.memshare, engine.bytes_per_block)
    assert "Nothing was shared in this answer" in html
    assert not Page(html).links


def test_a_chain_of_copies_ends_at_a_block_that_stays(engine):
    """With four re-checks each copy is handed on to the next: arrows lead to the last one."""
    story = explain(engine, engine.memshare, "Q: 890 + 49 - 638 = ?\n", 2048, "cpu")
    assert any(len(b.readers) > 1 for b in story.blocks)
    assert all(story.blocks[b.donor].donor is None for b in story.blocks if b.donor is not None)


@pytest.fixture(scope="module")
def pressed(engine):
    """A story under pressure, and what went in it: (page, repeated, need, tokens of the request) as pressure saw it."""
    seen, class_ = [], pressure.Pressure
    carry_out, retirement, executors = class_._carry_out, pressure.Retirement, []

    def watched(self, choice, views, donors):
        executors.append(self)
        return carry_out(self, choice, views, donors)

    def noted(request_id, pages, repeated, need):
        # The token sampled last is written, but has no place in the cache before its step.
        tokens = executors[-1]._manager._sequences[request_id].num_tokens + 1
        seen.extend((p, r, n, tokens) for p, r, n in zip(pages, repeated, need, strict=True))
        return retirement(request_id, pages, repeated, need)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_, "_carry_out", watched)
        patch.setattr(pressure, "Retirement", noted)
        config = make_config("pressure", min_kept=0.3, retired_becomes="dropped")
        story = explain(engine, config, PROMPT, 2048, "cpu")
    return story, seen, executors[-1].stats.retired_pages, render(story, config, engine.bytes_per_block)


def test_a_story_under_pressure_is_what_pressure_did(pressed):
    story, seen, retired, _ = pressed
    gone = {b.index: b for b in story.blocks if b.fate is Fate.RETIRED}
    assert len(seen) == len(gone) == story.freed
    for page, repeated, need, tokens in seen:
        block = gone[page]
        assert block.reason == ("repeated" if repeated else "needed least")
        assert block.need == pytest.approx(need)
        assert block.given_up_at == tokens
        assert tokens - (page + 1) * story.tokens_per_block >= 127, "among the last 128 tokens"
    assert story.reasons == {"repeated": retired["repeated"], "needed least": retired["needed_least"]}
    assert min(story.reasons.values()) > 0
    assert all(b.reason is b.need is b.given_up_at is None for b in story.blocks if b.fate is not Fate.RETIRED)
    assert all(b.fate is not Fate.SHARED and b.donor is None for b in story.blocks)


def test_memory_under_pressure_stays_within_the_pool_and_the_floor_is_kept(pressed):
    story = pressed[0]
    assert max(held for _, held, _ in story.memory) <= story.pool_blocks < story.memory[-1][2]
    assert story.memory[-1][2] - story.memory[-1][1] == story.freed
    assert 0.3 * story.filled <= story.filled - story.freed


def test_the_page_and_the_lines_show_which_blocks_went_when_and_why(pressed):
    story, _, _, html = pressed
    page = Page(html)
    assert page.texts == {f"b{b.index}": "".join(b.pieces) for b in story.blocks}
    assert not page.links
    lines = describe_story(story).splitlines()
    counts = f"{story.reasons['needed least']} needed least, {story.reasons['repeated']} repeated"
    assert lines[0].startswith(f"{story.freed} of {story.filled} generated blocks given up")
    assert counts in lines[0]
    assert counts in html
    told = {int(line.split(":")[0].removeprefix("at token ")): line for line in lines[1:]}
    for block in (b for b in story.blocks if b.fate is Fate.RETIRED):
        sentence = f"Block {block.index}, given up at token {block.given_up_at}: {block.reason}, need {block.need:.3g}."
        assert html.count(sentence) == 2, "on the map and in the text"
        assert f'<span class="tag">{block.index} ✕{block.given_up_at}</span>' in html
        assert f"{block.index} ({block.reason}, need {block.need:.3g})" in told[block.given_up_at]
    assert f'<span class="block retired">given up</span>{story.freed} blocks' in html
    assert 'class="block shared"' not in html
    assert f"pool: {story.pool_blocks} blocks" in html


def test_a_pool_that_is_given_is_taken_and_one_with_room_gives_nothing_up(engine, tmp_path, capsys):
    base = ["explain", "--engine-dir", str(engine.engine_dir), "--prompt", PROMPT, "--device", "cpu"]
    base += ["--output", str(tmp_path / "page.html"), "--preset", "pressure", "--set", "retired_becomes=dropped"]
    main([*base, "--max-new-tokens", "240", "--kv-cache-blocks", "14"])
    assert re.search(r"^4 of 15 generated blocks given up .* in a pool of 14 blocks$", capsys.readouterr().out, re.M)
    main([*base, "--max-new-tokens", "240", "--kv-cache-blocks", "100"])
    assert "0 of" in capsys.readouterr().out
    html = (tmp_path / "page.html").read_text()
    assert "Nothing was given up: the pool had room" in html
    assert "the same text" in html


@pytest.mark.parametrize(
    ("blocks", "headline"),
    [
        (3, "Nothing could be given up, and the answer was cut: the pool could hold no more of it"),
        (12, "of this answer's blocks were given up, and the answer was cut: the pool could hold no more of it"),
    ],
)
def test_an_answer_that_the_pool_cut_says_so_and_claims_neither_room_nor_another_text(engine, blocks, headline):
    config = make_config("pressure", retired_becomes="dropped", min_kept=0.9)
    story = explain(engine, config, PROMPT, 2048, "cpu", blocks)
    html = render(story, config, engine.bytes_per_block)
    assert story.cut
    assert (story.freed > 0) == (blocks > 3)
    assert headline in html
    assert "(cut: the pool could hold no more)" in html
    assert "with the full cache, until the pool could hold no more of it" in html
    assert "the answer was cut: the pool could hold no more of it" in describe_story(story)
    for claim in ("had room", "fits the pool", "the model ended it", "the longest length"):
        assert claim not in html
    if blocks == 3:  # nothing went, so up to its end it is the full cache's
        assert story.same_text
        assert "<b>the same text</b>" in html


def test_an_answer_that_ends_at_the_length_asked_for_was_not_cut_by_the_pool(engine):
    config = make_config("pressure", retired_becomes="dropped")
    story = explain(engine, config, PROMPT, 40, "cpu", 100)
    assert (story.finish_reason, story.cut) == ("length", False)
    assert "Nothing was given up: the pool had room" in render(story, config, engine.bytes_per_block)


@pytest.mark.parametrize("ends", [(100, 101), (5, 200), (1, 2), (0, 0)], ids=str)
def test_names_of_both_lines_are_within_the_drawing_and_apart(ends):
    """A pool of 1,000 blocks presses both lines to the bottom."""
    held, logical = ends
    blocks = (BlockStory(0, Fate.PROMPT, ("a",), (False,)),)
    memory = ((16, held, logical), (17, held, logical)) if logical else ()
    story = Story("a", blocks, 16, memory, "length", 16, 1, True, {}, {}, 1000)
    html = render(story, make_config("pressure"), 1024)
    chart = html[html.rindex("<svg viewBox") :]
    lines = [float(y) for y in re.findall(r'<text(?: class="name")? x="858" y="([\d.]+)">', chart)]
    ticks = [float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="middle">\d+ tokens', chart)]
    assert len(lines) == 4
    assert min(lines) > 12
    assert max(lines) + 12 <= min(ticks)
    assert all(after - before >= 14 for before, after in pairwise(sorted(lines)))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_renders_the_page_and_runs_its_script(engine, tmp_path):
    page = tmp_path / "page.html"
    main(["explain", "--engine-dir", str(engine.engine_dir), "--prompt", PROMPT, "--output", str(page)])
    # Pointing at the first block that was given back lights its arc and draws its connection over the text.
    probe = (
        "<script>window.addEventListener('load', function () {"
        "document.querySelector('a.block').dispatchEvent(new Event('mouseenter'));});</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", probe))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run(
        [CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert '<p class="controls">' in dom
    assert 'class="arc lit"' in dom
    assert 'class="curve lit"' in dom
    assert re.search(r'id="said"[^>]*>Block 2, given back', dom)
