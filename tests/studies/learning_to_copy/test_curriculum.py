"""What the model of the traces is shown at each share of its training."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.studies.learning_to_copy.curriculum import Curriculum, Mixture

VOCAB, FIRST, PAD = 300, 4, 1
DOCUMENTS = [np.arange(3000) % 37 + FIRST, np.arange(700) % 11 + 200]


def curriculum(mixture=Mixture(), **changes):
    settings = {"tokens_per_step": 4096, "longest_window": 4096, "seed": 7, **changes}
    return Curriculum(DOCUMENTS, mixture, VOCAB, FIRST, PAD, **settings)


def period(row):
    return next(n for n in range(1, len(row)) if (row[n:] == row[:-n]).all())


@pytest.mark.parametrize(("done", "window", "longest"), [(0.0, 64, 16), (0.1, 256, 128), (0.149, 1024, 512)])
def test_random_tokens_come_again_at_growing_distances(done, window, longest):
    drawn = curriculum()
    batches = [drawn.batch(done) for _ in range(4)]
    assert not drawn.in_text
    assert all(b.shape == (4096 // window, window) and b.min() >= FIRST and b.max() < VOCAB for b in batches)
    periods = [period(row) for b in batches for row in b]
    assert longest / 3 < max(periods) <= longest
    assert len(set(periods)) > 3


@pytest.mark.parametrize(("done", "window"), [(0.15, 1024), (0.8, 2048), (1.0, 4096)])
def test_text_windows_grow_and_never_outgrow_the_context(done, window):
    drawn = curriculum()
    assert drawn.batches().send(done).shape == (4096 // window, window)
    assert drawn.in_text
    assert curriculum(longest_window=512).batch(done).shape == (8, 512)


def test_text_comes_from_one_document_and_is_padded_at_its_end():
    plain = Mixture(repeats=0.0, passages=0.0, passages_at_end=0.0, renamed=0.0, renamed_at_end=0.0)
    for row in np.concatenate([curriculum(plain, seed=s).batch(0.0) for s in range(5)]):
        text = row[row != PAD]
        assert (row[len(text) :] == PAD).all()
        first = next(d for d in DOCUMENTS if text[0] in d)
        assert (np.diff(text) == 1).mean() > 0.9
        assert set(text) <= set(first)


def test_renaming_keeps_the_repeats_and_the_special_tokens():
    renamed = Mixture(repeats=0.0, passages=0.0, passages_at_end=0.0, renamed=1.0, renamed_at_end=1.0)
    rows = np.concatenate([curriculum(renamed, seed=s).batch(0.0) for s in range(5)])
    outside = 0
    for row in rows:
        text = row[row != PAD]
        assert period(text) in (11, 37)
        assert text.min() >= FIRST
        outside += len(set(text) - set(np.concatenate(DOCUMENTS))) > 0
    assert outside > len(rows) / 2
    assert len({tuple(row) for row in rows}) == len(rows)


def test_passages_come_again_behind_others():
    passages = Mixture(repeats=0.0, passages=1.0, passages_at_end=1.0)
    rows = curriculum(passages).batch(0.0)
    eights = [{tuple(row[i : i + 8]) for i in range(len(row) - 7)} for row in rows]
    assert all(len(e) < 0.9 * (len(row) - 7) for e, row in zip(eights, rows, strict=True))


def test_shares_fall_linearly_to_their_ends():
    """At the end no window holds random tokens any more, halfway some do."""
    falling = Mixture(repeats=0.0, passages=1.0, passages_at_end=0.0, renamed=0.0, renamed_at_end=0.0)
    known = set(np.concatenate(DOCUMENTS)) | {PAD}
    foreign = [
        np.mean([bool(set(row) - known) for s in range(25) for row in curriculum(falling, seed=s).batch(done)])
        for done in (0.0, 0.5, 1.0)
    ]
    assert foreign[0] > foreign[1] > foreign[2] == 0.0


def test_the_same_seed_draws_the_same():
    first, second = (curriculum() for _ in range(2))
    for done in (0.0, 0.12, 0.5, 0.99):
        assert (first.batch(done) == second.batch(done)).all()
