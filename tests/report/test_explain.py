"""The page about one answer: what it says is what the cache did, and nothing in it comes from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from trtllm_memshare.__main__ import main
from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.story import BlockStory, Fate, Story
from trtllm_memshare.report.explain import explain
from trtllm_memshare.report.explain_page import render
from trtllm_memshare.search.config import make_config

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
            assert block.shared_at >= (block.index + 1) * story.tokens_per_block
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--prompt", "  "], "--prompt must be text that the tokenizer knows"),
        (["--set", "max_distanc=1"], "unknown key max_distanc .did you mean max_distance"),
        (["--set", "shadow=true"], "explain shows what sharing does, got shadow True"),
        (["--output", "no/such/folder/page.html"], "cannot write no/such/folder/page.html"),
        (["--prompt", "Q: 1 + 1 = ?\n" * 400], "must fit max_seq_len"),
        (["--max-new-tokens", "0"], "max_new_tokens must be between 1 and"),
    ],
)
def test_errors_of_users(engine, tmp_path, changes, message):
    base = ["explain", "--engine-dir", str(engine.engine_dir), "--prompt", PROMPT, "--device", "cpu"]
    with pytest.raises(UserError, match=message):
        main([*base, "--output", str(tmp_path / "page.html"), *changes])
    assert not (tmp_path / "page.html").exists()


def test_an_engine_without_sharing_has_nothing_to_explain(bundled_model, tmp_path):
    build_engine(plan_build(BuildOptions(model_dir=bundled_model, output_dir=tmp_path / "engine")))
    with pytest.raises(UserError, match=r"shares nothing, so there is nothing to explain \(give --preset aligned\)"):
        main(["explain", "--engine-dir", str(tmp_path / "engine"), "--prompt", PROMPT])


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
