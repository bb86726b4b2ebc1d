"""What the page about one answer says: names of fates, and the sentences that differ between sharing and pressure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from trtllm_memshare.evaluation.story import BlockStory, Fate, Story
from trtllm_memshare.search.config import MemShareConfig

_SHARING = {
    Fate.PROMPT: ("prompt", "holds part of the question: never given back"),
    Fate.OWN: ("kept", "its text has no copy, or too different a one"),
    Fate.SHARED: ("given back", "one of several copies: its memory was freed, another block is read in its place"),
    Fate.DONOR: ("read by several", "the copy that stays, and stands for the places that point to it"),
    Fate.PROTECTED: ("recent", "too new to be given back: the last steps are left alone"),
}
_PRESSURE = {
    Fate.PROMPT: ("prompt", "holds part of the question: never given up"),
    Fate.OWN: ("kept", "needed more than those that went, or the floor was reached"),
    Fate.RETIRED: ("given up", "its memory was freed when the pool ran short; from then on it is not read"),
    Fate.PROTECTED: ("recent", "too new to be given up: the last tokens are left alone"),
}


def fates(story: Story) -> Mapping[Fate, tuple[str, str]]:
    """Fates that blocks of this story can have, each with its name on the page and what it means."""
    return _SHARING if story.pool_blocks is None else _PRESSURE


def describe_block(story: Story, block: BlockStory) -> str:
    """One sentence on a block."""
    name, meaning = fates(story)[block.fate]
    if block.fate is Fate.SHARED:
        how = "" if block.distance is None else f"; the notes of the two differ by {block.distance:.0%}"
        return (
            f"Block {block.index}, {name} at token {block.given_up_at}: block {block.donor} is read in its place{how}."
        )
    if block.fate is Fate.RETIRED:
        return f"Block {block.index}, {name} at token {block.given_up_at}: {block.reason}, need {block.need:.3g}."
    if block.fate is Fate.DONOR:
        listed = ", ".join(map(str, block.readers))
        return f"Block {block.index}, {name}: it also stands for block{'s' * (len(block.readers) > 1)} {listed}."
    return f"Block {block.index}, {name}: {meaning}."


def describe_reasons(story: Story) -> str:
    """Blocks given up under pressure, by reason."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(story.reasons.items())) or "none"


def describe_story(story: Story) -> str:
    """The story in a few lines; under pressure one for each time at which blocks went."""
    share = story.freed / story.filled if story.filled else 0.0
    counts = f"{story.freed} of {story.filled} generated blocks given"
    if story.pool_blocks is None:
        return f"{counts} back ({share:.0%})"
    lines = [f"{counts} up ({share:.0%}; {describe_reasons(story)}) in a pool of {story.pool_blocks} blocks"]
    lines += ["the answer was cut: the pool could hold no more of it"] * story.cut
    times = defaultdict[int, list[str]](list)
    for block in story.blocks:
        if block.given_up_at is not None:
            times[block.given_up_at].append(f"{block.index} ({block.reason}, need {block.need:.3g})")
    return "\n".join(lines + [f"at token {at}: block {', '.join(blocks)}" for at, blocks in sorted(times.items())])


def paragraphs(story: Story, config: MemShareConfig) -> dict[str, str]:
    """Headline and explanations of the page, by their names in the template; HTML."""
    share = f"{story.freed / story.filled if story.filled else 0.0:.0%} of this answer's blocks were given"
    if story.pool_blocks is not None:
        headline = f"{share} up" if story.freed else "Nothing was given up: the pool had room"
        if story.cut:
            given = f"{share} up" if story.freed else "Nothing could be given up"
            headline = f"{given}, and the answer was cut: the pool could hold no more of it"
        return {
            "headline": headline,
            "method": (
                "When many answers are written at once, the memory runs short. MemShare then gives blocks up before "
                "anybody has to wait: first those whose text the answer holds once more, word for word and later, then "
                f"those that are needed least (here by {config.need}; lower goes first). The question and the last "
                f"{config.protected_tokens} pieces stay in any case, and {config.min_kept:.0%} of the blocks that the "
                f"model wrote, unless their text stands again. Here the answer was alone, in a pool of "
                f"{story.pool_blocks} blocks."
            ),
            "map_note": "",
            "text_note": "<b>12 ✕400</b> was given up when 400 tokens were written.",
            "table_title": "Every block that was given up, in the order of time",
        }
    kept, retired = ("newer", "older") if config.direction == "keep-latest" else ("older", "newer")
    return {
        "headline": f"{share} back" if story.freed else "Nothing was shared in this answer",
        "method": (
            "A model that thinks aloud repeats itself: it checks a sum again, or restates a step. The notes on both "
            "copies then say nearly the same. MemShare looks for such copies while the model writes, compares the "
            f"notes themselves, and where they agree it keeps the {kept} block, lets the {retired} place point to it, "
            f"and gives the {retired} block back for others to use."
        ),
        "map_note": "An arc leads from each block that was given back to the block that is read in its place.",
        "text_note": (
            "<b>12→40</b> was given back and reads block 40, <b>40 ×3</b> stands for three places, its own among them."
        ),
        "table_title": "Every block that was given back",
    }
