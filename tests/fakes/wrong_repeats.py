"""Ways to get ``search.repeats.stands_again`` wrong: what checks it must see each of them."""

from __future__ import annotations

import numpy as np

from trtllm_memshare.search.repeats import stands_again


def always(*_):
    return True


def whether_or_not_copies_are_kept(matcher, page, size, num_computed, is_gone):
    return stands_again(matcher, page, size, num_computed, lambda t: t < 0)


def if_one_copy_is_kept(matcher, page, size, num_computed, is_gone):
    return not is_gone(matcher.counterparts(page)[0].clip(0, num_computed - 1)).all()


def if_each_copy_that_went_has_one(matcher, page, size, num_computed, is_gone):
    gone = np.flatnonzero(is_gone(np.arange(num_computed)))
    alone = [t for t in gone if matcher.counterparts(t // size)[0][t % size] < 0]
    return stands_again(matcher, page, size, num_computed, lambda t: np.isin(t, alone))


def but_for_the_last_token(matcher, page, size, num_computed, is_gone):
    last = matcher.counterparts(page)[0][-1]
    return stands_again(matcher, page, size, num_computed, lambda t: is_gone(t) & (t != last))


ALL = (
    always,
    whether_or_not_copies_are_kept,
    if_one_copy_is_kept,
    if_each_copy_that_went_has_one,
    but_for_the_last_token,
)
