"""Which distance foretells the harm of a remap: pairs of every kind, their harm, and every definition held against it.

Learned weights are fitted on every other text; all figures are of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.studies.distances.block_attention import block_attention
from benchmarks.studies.distances.block_pairs import KINDS, pairs_of_kind
from benchmarks.studies.distances.distances import (
    DEFAULT,
    LEARNED,
    PairSums,
    all_distances,
    fit_weights,
    learned_features,
    pair_sums,
)
from benchmarks.studies.distances.foretelling import SHARES, Judged, compare_definitions
from benchmarks.studies.distances.harm import ReadText
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.teacher_forced import Script
from trtllm_memshare.search.policy import make_pairs
from trtllm_memshare.search.steps import BoundaryTokens

GROUPS: dict[str, tuple[str, ...]] = {
    "all": ("repeat", "near", "similar", "random"),
    "near+similar": ("near", "similar"),
    **{kind: (kind,) for kind in KINDS},
}
"""Kinds that are judged together. Those that keep the older copy stand alone: no threshold meets both directions."""

NO_DISTANCES = (
    "differing tokens",
    "attention",
    "attention x distance",
    "later attention",
    "later attention x distance",
)
"""What is held against harm beside distances, to see what these miss."""

_ATTENTION_TOKENS = 64  # recent queries whose attention on a block is taken


@dataclass(frozen=True)
class StudyOptions:
    """What is sampled.

    Attributes:
      pairs_per_kind: most pairs of each kind from one text.
      min_following: tokens that must follow a remap; what is given up at the very end saves nothing.
      num_resamples: of the bootstrap.
    """

    pairs_per_kind: int = 4
    min_following: int = 64
    num_resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class StudiedPairs:
    """Pairs of blocks with what was measured, in order of the texts.

    Attributes:
      kind, text: str and int ``[pairs]``.
      harm: float64 ``[pairs]``, mean KL over all tokens that follow, in nats per token. A freed block saves a
        block-step with each of them, so this is also the harm for each block-step saved.
      harm_of_values: float64 ``[pairs]``, the same if each token kept its K and had its counterpart's V alone, which a
        table can do for blocks in phase only.
      differing_tokens: int ``[pairs]``.
      attention, later_attention: float64 ``[pairs]``, on the block to be retired: of the last 64 tokens before it goes,
        and of all tokens after, which nobody knows in time. Means over tokens, layers and heads.
    """

    kind: np.ndarray
    text: np.ndarray
    harm: np.ndarray
    harm_of_values: np.ndarray
    differing_tokens: np.ndarray
    attention: np.ndarray
    later_attention: np.ndarray
    sums: PairSums


def study_pairs(
    model_dir: Path, scripts: list[Script], size: int, boundaries: BoundaryTokens, options: StudyOptions
) -> StudiedPairs:
    """Samples pairs from written texts and measures them.

    Args:
      model_dir: a checkpoint with rotary embeddings over the whole head, half-split; it runs on the CPU.
      scripts: what the full cache wrote, or text of another origin.
      size: tokens per block.

    Raises:
      UserError: the texts are too short or too few to be judged on.
    """
    rng, parts, rows = np.random.default_rng(options.seed), list[PairSums](), list[tuple[Any, ...]]()
    # float64: most remaps do less than float32 can tell from nothing.
    model = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True).double().eval()
    shows = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True, attn_implementation="eager").eval()
    inv_freq = model.model.rotary_emb.inv_freq.float()
    for index, script in enumerate(tqdm(scripts, desc="texts", unit="text")):
        token_ids = script.prompt + script.output
        chosen = []
        for kind in KINDS:
            pairs = pairs_of_kind(kind, script.prompt, script.output, size, boundaries, index)
            pairs = [p for p in pairs if len(token_ids) - 1 - p.remap.reads_from >= options.min_following]
            order = rng.permutation(len(pairs))[: options.pairs_per_kind]
            chosen += [(kind, pairs[i]) for i in order.tolist()]
        if not chosen:
            continue
        read, attention = ReadText(model, token_ids, size), block_attention(shows, token_ids, size)
        pool = read.pool()
        origins = np.arange(len(pool), dtype=np.int32) * size
        batch = make_pairs([pair.candidate for _, pair in chosen], origins, size, undo_rope=True)
        parts.append(pair_sums(pool, batch, inv_freq))
        for name, pair in chosen:
            start = pair.remap.reads_from
            on_block = attention[:, pair.remap.retired].double()
            recent, later = on_block[max(0, start - _ATTENTION_TOKENS) : start].mean(), on_block[start:-1].mean()
            harm = read.harm(pair.remap, len(token_ids))
            of_values = read.harm(
                replace(pair.remap, values_from=tuple(pair.candidate.kept_rows.tolist())), len(token_ids)
            )
            rows.append((name, index, harm, of_values, pair.differing_tokens, float(recent), float(later)))
    if {row[1] % 2 for row in rows if row[0] in GROUPS["near+similar"]} != {0, 1}:
        raise UserError(
            f"a study needs near or similar pairs in both halves of the texts, got {len(rows)} pairs of any kind in "
            f"{len(scripts)} texts (give longer texts, or more)"
        )
    kinds, texts, harms, v_harms, differing, recents, laters = (np.array(c) for c in zip(*rows, strict=True))
    return StudiedPairs(kinds, texts, harms, v_harms, differing, recents, laters, PairSums.join(parts))


def judge(pairs: StudiedPairs, options: StudyOptions) -> dict[str, Any]:
    """Figures of a study: ``kinds``, ``learned`` weights, and for each of ``groups`` every definition's;
    kinds and groups without a pair are left out.

    The half of the texts with an odd index is judged on; the weights come from the other, from the kinds of ``all``.
    Of some ninety definitions a few win by chance: ``again`` has the figures, on the other half, of those that beat the
    first on this one.
    """
    fixed = all_distances(pairs.sums)
    definitions = {DEFAULT: fixed.pop(DEFAULT), **fixed}
    trained = (pairs.text % 2 == 0) & np.isin(pairs.kind, GROUPS["all"])
    learned = {}
    for name, quantities in LEARNED.items():
        features = learned_features(pairs.sums, name)
        weights = fit_weights(features[trained], pairs.harm[trained])
        definitions[name] = (features * weights).sum((1, 2))
        learned[name] = {"quantities": quantities, "weights": np.round(weights, 3).tolist()}
    distance = definitions[DEFAULT]
    no_distances = (
        pairs.differing_tokens.astype(float),
        pairs.attention,
        pairs.attention * distance,
        pairs.later_attention,
        pairs.later_attention * distance,
    )
    definitions |= zip(NO_DISTANCES, no_distances, strict=True)
    groups, again = {}, {}
    for group, kinds in GROUPS.items():
        tested = np.isin(pairs.kind, kinds) & (pairs.text % 2 == 1)
        if not tested.any():
            continue
        judged = Judged(pairs.harm, pairs.text, definitions).where(tested)
        shares = SHARES if len(kinds) > 1 else ()  # no threshold meets one kind alone
        figures = compare_definitions(judged, options.num_resamples, options.seed, shares)
        if shares:
            others = np.isin(pairs.kind, kinds) & (pairs.text % 2 == 0)
            winners = {DEFAULT: distance, **{n: fixed[n] for n in fixed if beats(figures[n])}}
            repeated = Judged(pairs.harm, pairs.text, winners).where(others)
            again[group] = compare_definitions(repeated, options.num_resamples, options.seed, shares)
        groups[group] = {
            "pairs": int(tested.sum()),
            "texts": len(np.unique(judged.problem)),
            "mean_harm": float(judged.harm.mean()),
            "top_percent_share": _share_of_most_harmful(judged.harm),
            "definitions": figures,
        }
    present = [kind for kind in KINDS if kind in pairs.kind]
    described = {kind: _describe(pairs, kind) for kind in present}
    return {"kinds": described, "learned": learned, "groups": groups, "again": again}


def beats(figures: dict[str, Any]) -> bool:
    """Whether a definition is better than the first beyond its 95 % interval, in any of its figures."""
    gains = [figures[measure]["gain_interval"][0] > 0 for measure in ("rank_correlation", "auc")]
    return any(gains) or any(accepted["ratio_interval"][1] < 1 for accepted in figures["accepted"].values())


def _describe(pairs: StudiedPairs, kind: str) -> dict[str, Any]:
    """Spread of harm and of the default distance over all pairs of a kind, both halves."""
    chosen = pairs.kind == kind
    harm, distance = pairs.harm[chosen], all_distances(pairs.sums)[DEFAULT][chosen]
    return {
        "pairs": int(chosen.sum()),
        "texts": len(np.unique(pairs.text[chosen])),
        "mean_harm": float(harm.mean()),
        "mean_harm_of_values": float(pairs.harm_of_values[chosen].mean()),
        "harm": {f"p{q}": float(np.percentile(harm, q)) for q in (10, 50, 90, 99, 100)},
        "distance": {f"p{q}": float(np.percentile(distance, q)) for q in (10, 50, 90)},
    }


def _share_of_most_harmful(harm: np.ndarray) -> float:
    """Share of the total harm that the most harmful hundredth of the pairs makes."""
    count = max(1, round(len(harm) / 100))
    return float(np.sort(harm)[-count:].sum() / harm.sum())
