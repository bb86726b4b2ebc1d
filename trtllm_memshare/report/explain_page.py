"""Turns the story of a request into one HTML file without any outside part."""

from __future__ import annotations

import string
from html import escape
from importlib import resources
from itertools import pairwise

from trtllm_memshare.builder.summary import describe_sharing
from trtllm_memshare.evaluation.story import BlockStory, Fate, Story
from trtllm_memshare.report.explain_words import describe_block, describe_reasons, fates, paragraphs
from trtllm_memshare.search.config import MemShareConfig

_WIDTH, _LEFT = 1000, 46  # of both drawings, in their own units
_CHART_HEIGHT = 240


def render(story: Story, config: MemShareConfig, bytes_per_block: int) -> str:
    """The page.

    Args:
      bytes_per_block: K and V of one block over all layers.
    """
    template = resources.files("trtllm_memshare") / "report" / "templates" / "explain.html"
    gone = [b for b in story.blocks if b.fate in (Fate.SHARED, Fate.RETIRED)]
    lengths = [len(piece) for block in story.blocks for piece in block.pieces]
    characters = max(lengths, default=0) <= 1 or sum(n == 1 for n in lengths) / len(lengths) > 0.9
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        paragraphs(story, config),
        subline=f"Question: {escape(' '.join(story.prompt.split()))}",
        figures=_figures(story, bytes_per_block),
        tokens_per_block=story.tokens_per_block,
        token_word="single characters" if characters else "words and parts of words",
        legend="\n".join(_legend_entry(story, fate) for fate in fates(story)),
        map=_block_map(story),
        chart=_memory_chart(story, bytes_per_block),
        text=_text(story),
        table_summary=f"{len(gone)} blocks" if gone else "none",
        table=_table(gone, story) if story.pool_blocks is None else _pressure_table(gone, story.cut),
        settings=escape(_settings(story, config)),
    )


def _figures(story: Story, bytes_per_block: int) -> str:
    peak_with = max((m[1] for m in story.memory), default=0)
    peak_without = max((m[2] for m in story.memory), default=0)
    same = "the same text" if story.same_text else "another text"
    until = ", until the pool could hold no more of it" if story.cut else ""
    how = "given back" if story.pool_blocks is None else f"given up: {describe_reasons(story)}"
    cells = [
        (f"{story.freed} of {story.filled}", f"blocks that the model wrote were {how}"),
        (
            f"{peak_with} in place of {peak_without}",
            f"blocks held at once at most: {_size(peak_with * bytes_per_block)} in place of "
            f"{_size(peak_without * bytes_per_block)}",
        ),
        (same, f"came out {'as' if story.same_text else 'than'} with the full cache{until}"),
    ]
    return "\n".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in cells)


def _legend_entry(story: Story, fate: Fate) -> str:
    name, meaning = fates(story)[fate]
    count = sum(b.fate is fate for b in story.blocks)
    return f'<li><span class="block {fate.value}">{name}</span>{count} blocks: {meaning}</li>'


def _block_map(story: Story) -> str:
    """Blocks as a row of cells with arcs from each block that was given back to the one read in its place."""
    count = max(1, len(story.blocks))
    step = (_WIDTH - 2) / count
    longest = max((b.donor - b.index for b in story.blocks if b.donor is not None), key=abs, default=0)
    height = min(190.0, 18 + abs(longest) * step / 2)
    top, cells, arcs = height + 4, [], []
    for block in story.blocks:
        x = 1 + block.index * step
        title = escape(describe_block(story, block))
        cells.append(
            f'<rect class="cell {block.fate.value}" x="{x:.1f}" y="{top:.1f}" width="{step * 0.86:.1f}" height="26" '
            f'rx="2"><title>{title}</title></rect>'
        )
        if count <= 120 and (block.index % 5 == 0 or count <= 30):
            cells.append(
                f'<text x="{x + step * 0.43:.1f}" y="{top + 42:.1f}" text-anchor="middle">{block.index}</text>'
            )
        if block.donor is not None:
            start, end = x + step * 0.43, 1 + (block.donor + 0.43) * step
            rise = max(12.0, abs(block.donor - block.index) / max(1, abs(longest)) * (height - 6))
            # The top of a cubic curve lies at three quarters of the height of its two handles.
            handle = top - rise / 0.75
            arcs.append(
                f'<path class="arc" id="arc-b{block.index}" d="M{start:.1f} {top:.1f} C{start:.1f} {handle:.1f} '
                f'{end:.1f} {handle:.1f} {end:.1f} {top:.1f}" marker-end="url(#tip)"><title>{title}</title></path>'
            )
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker></defs>'
    )
    what = "point to another block" if story.pool_blocks is None else "were given up"
    label = f"{len(story.blocks)} blocks in a row; {story.freed} of them {what}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {top + 50:.0f}" role="img" aria-label="{label}">{marker}'
        f"{''.join(cells)}{''.join(arcs)}</svg>"
    )


def _memory_chart(story: Story, bytes_per_block: int) -> str:
    """Blocks held with and without sharing or pressure, against tokens written; a line where the pool ends."""
    points = story.memory or ((0, 0, 0),)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    top = max(*(m[2] for m in points), story.pool_blocks or 0, 1)
    bottom, right, roof = _CHART_HEIGHT - 34, _WIDTH - 150, 16

    def place(tokens: int, blocks: int) -> str:
        x = _LEFT + (tokens - first) / (last - first) * (right - _LEFT)
        return f"{x:.1f},{bottom - blocks / top * (bottom - roof):.1f}"

    # A value holds until the next one: corners, not slopes.
    lines = []
    for column in (1, 2):
        corners = [place(points[0][0], points[0][column])]
        for before, after in pairwise(points):
            if before[column] != after[column] or after is points[-1]:
                corners += [place(after[0], before[column]), place(after[0], after[column])]
        lines.append(corners)
    held, full = lines
    ticks = []
    for share in (0, 0.5, 1):
        blocks = round(top * share)
        y = float(place(first, blocks).split(",")[1])
        ticks.append(
            f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{blocks}</text>'
        )
    for tokens in (first, (first + last) // 2, last):
        x = place(tokens, 0).split(",")[0]
        ticks.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tokens} tokens</text>')
    if story.pool_blocks is not None:
        y = float(place(first, story.pool_blocks).split(",")[1])
        ticks.append(
            f'<line class="pool" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/><text x="{_LEFT + 8}" '
            f'y="{y - 6:.1f}">pool: {story.pool_blocks} blocks, {_size(story.pool_blocks * bytes_per_block)}</text>'
        )
    with_name = "with sharing" if story.pool_blocks is None else "under pressure"
    end_with, end_without = points[-1][1:]
    y_with, y_without = (float(place(last, n).split(",")[1]) for n in (end_with, end_without))
    y_with = min(max(y_with, y_without + 32), bottom - 16)  # two labels of two lines must not touch
    y_without = min(y_without, y_with - 32)  # nor the lower one reach what stands below the axis
    names = "".join(
        f'<text class="name" x="{right + 8}" y="{y + 4:.1f}">{name}</text>'
        f'<text x="{right + 8}" y="{y + 18:.1f}">{blocks} blocks, {_size(blocks * bytes_per_block)}</text>'
        for name, y, blocks in (("without", y_without, end_without), (with_name, y_with, end_with))
    )
    label = f"Blocks held while writing: {end_with} at the end {with_name}, {end_without} without"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_CHART_HEIGHT}" role="img" aria-label="{label}">'
        f'<polygon class="saved" points="{" ".join(full + held[::-1])}"/>{"".join(ticks)}'
        f'<polyline class="without" points="{" ".join(full)}"/><polyline class="with" points="{" ".join(held)}"/>'
        f"{names}</svg>"
    )


def _text(story: Story) -> str:
    """Blocks as inline elements, each once; a step that starts inside a block starts a line there."""
    parts, step, line_open = [], 0, False
    for block in story.blocks:
        tag = str(block.index)
        if block.donor is not None:
            tag += f"→{block.donor}"
        elif block.readers:
            tag += f" ×{len(block.readers) + 1}"
        elif block.fate is Fate.RETIRED:
            tag += f" ✕{block.given_up_at}"
        body = list[str]()
        for place, (piece, starts) in enumerate(zip(block.pieces, block.step_starts, strict=True)):
            if starts:
                step += 1
                body.append(("<br>" if line_open else "") + f'<i class="step" aria-label="step {step}">{step}</i>')
                line_open = False
            if place == 0:
                body.append(f'<span class="tag">{tag}</span>')
            body.append(escape(piece))
            line_open = not piece.endswith("\n") if piece else line_open
        # What is connected can be reached with the keyboard; a block that was given back leads to its stand-in.
        common = f'class="block {block.fate.value}" id="b{block.index}" title="{escape(describe_block(story, block))}"'
        if block.donor is not None:
            element = f'<a {common} href="#b{block.donor}" data-donor="b{block.donor}">{"".join(body)}</a>'
        else:
            focus = ' tabindex="0"' if block.readers or block.reason else ""
            element = f"<span {common}{focus}>{''.join(body)}</span>"
        parts.append(element)
    return "".join(parts)


def _table(shared: list[BlockStory], story: Story) -> str:
    if not shared:
        return "<p>No block was given back: the answer is short, or says nothing twice.</p>"
    rows = []
    for block in shared:
        distance = "not compared" if block.distance is None else f"{block.distance:.0%}"
        donor = story.blocks[block.donor] if block.donor is not None else block
        rows.append(
            f'<tr><td class="number">{block.index}</td><td><code>{escape("".join(block.pieces).strip())}</code></td>'
            f'<td class="number">{block.donor}</td><td><code>{escape("".join(donor.pieces).strip())}</code></td>'
            f'<td class="number">{distance}</td><td class="number">{block.given_up_at}</td></tr>'
        )
    titles = ("block", "its text", "reads block", "text of that block", "difference", "given back at token")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    note = (
        "<p class='soft'>Copies need not start at the same place inside a block: the text of the two columns may be "
        "shifted, and the rest of it then lies in the block beside. The difference is that of the notes (0 % = equal), "
        "compared piece by piece in every layer of the model.</p>"
    )
    return f"{note}<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _pressure_table(gone: list[BlockStory], cut: bool) -> str:
    if not gone:
        why = "none of those in the pool may go" if cut else "the answer fits the pool"
        return f"<p>No block was given up: {why}.</p>"
    rows = [
        f'<tr><td class="number">{block.given_up_at}</td><td class="number">{block.index}</td>'
        f'<td>{block.reason}</td><td class="number">{block.need:.3g}</td>'
        f"<td><code>{escape(''.join(block.pieces).strip())}</code></td></tr>"
        for block in sorted(gone, key=lambda b: (b.given_up_at or 0, b.index))
    ]
    titles = ("given up at token", "block", "why", "need", "its text")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _settings(story: Story, config: MemShareConfig) -> str:
    turned = ", ".join(f"{count} {reason}" for reason, count in {**story.rejected, **story.refused}.items())
    counts = f"{story.num_prompt_tokens} tokens of question, {story.num_output_tokens} of answer"
    ended = "the model ended it" if story.finish_reason == "stop" else "cut off at the longest length"
    ended = "cut: the pool could hold no more" if story.cut else ended
    rest = (
        f"Pairs turned down: {turned or 'none'}" if story.pool_blocks is None else f"Pool: {story.pool_blocks} blocks"
    )
    return f"MemShare {describe_sharing(config)}. {counts} ({ended}). {rest}."


def _size(num_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    value, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB"]
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"
