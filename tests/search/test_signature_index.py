"""The index that keeps the redundancy of all requests' pages, against the definition written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_memshare.search import signature_index
from trtllm_memshare.search.signature_index import SignatureIndex, in_batches

SIZE, WIDTH = 8, 5


def unit_rows(rng) -> np.ndarray:
    rows = rng.standard_normal((SIZE, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_definition(pages: dict[int, np.ndarray], count: int) -> np.ndarray:
    """Redundancy of each of ``count`` pages of one request, of which these are there."""
    result = np.full(count, np.nan, np.float32)
    for page, rows in pages.items():
        later = [pages[p] for p in pages if p > page]
        result[page] = (rows @ np.concatenate(later).T).max(1).mean() if later else -1.0
    return result


class Requests:
    """Plays requests that grow, give pages up, end and come anew; and feeds an index with them.

    Args:
      rng: of the play.
      most: numbers that the index works out at once; None = as it is.
      device: of the index.
    """

    def __init__(self, rng, most: int | None = None, device: str = "cpu") -> None:
        self.rng, self.device, self.index = rng, device, SignatureIndex(SIZE, WIDTH, device)
        self.resident: dict[int, dict[int, np.ndarray]] = {name: {} for name in range(4)}
        self.known = dict.fromkeys(self.resident, 0)
        if most is not None:
            self.index._most = most

    def grow(self) -> None:
        """Some requests get a few pages, some of them copies in part; the last ones of before come again."""
        new, rows = [], []
        for name, pages in self.resident.items():
            if self.rng.random() < 0.3:
                continue
            first, own = self.known[name] or 3, self.rng.integers(1, 6)  # the first page at 3, as after a prompt
            again = list(range(3, first))[-2:]  # as after a pause: their signatures count no more
            for page in range(first, first + own):
                pages[page] = unit_rows(self.rng)
                if len(pages) > 1 and self.rng.random() < 0.3:
                    pages[page][: SIZE // 2] = pages[int(self.rng.choice(list(pages)[:-1]))][: SIZE // 2]
            new.append((name, np.array([*again, *range(first, first + own)])))
            rows += [*(unit_rows(self.rng) for _ in again), *(pages[p] for p in range(first, first + own))]
            self.known[name] = int(first + own)
        if new:
            self.index.extend(new, torch.from_numpy(np.stack(rows)).to(self.device))

    def lose(self) -> None:
        for name, pages in self.resident.items():
            if pages and self.rng.random() < 0.7:
                gone = self.rng.choice(list(pages), size=min(len(pages), int(self.rng.integers(1, 4))), replace=False)
                self.index.forget(name, np.append(gone, [0, self.known[name] + 5]))  # and some that it does not know
                self.resident[name] = {p: rows for p, rows in pages.items() if p not in gone}

    def end(self) -> None:
        name = int(self.rng.integers(len(self.resident)))
        self.index.drop(name)
        self.resident[name], self.known[name] = {}, 0

    def play(self) -> None:
        for _ in range(60):
            kind = self.rng.random()
            if kind < 0.5:
                self.grow()
            elif kind < 0.95:
                self.lose()
            else:
                self.end()
            if self.rng.random() < 0.6:
                self.check()
        self.check()

    def check(self) -> None:
        index = self.index
        used = [slot for request in index._requests.values() for slot in (*request.slots.tolist(), *request.gone)]
        assert sorted([0, *used, *index._free]) == list(range(len(index._rows)))
        for name, pages in self.resident.items():
            expected = by_definition(pages, self.known[name])
            np.testing.assert_allclose(self.index.redundancy(name), expected, atol=1e-5)


@pytest.mark.parametrize("most", [None, 4000, 1])
@pytest.mark.parametrize("seed", range(4))
def test_pages_of_several_requests_come_and_go_in_any_order(seed, most):
    """Together or in parts; pages that went may have been the nearest of others, several times before anybody asks."""
    Requests(np.random.default_rng(seed), most).play()


@pytest.mark.gpu
@pytest.mark.parametrize("most", [None, 4000])
def test_pages_come_and_go_on_a_gpu(most):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    Requests(np.random.default_rng(0), most, "cuda").play()


def test_requests_that_end_leave_their_room_to_others():
    requests = Requests(np.random.default_rng(0))
    for _ in range(40):
        requests.grow()
        requests.lose()
        for _ in range(len(requests.resident)):
            requests.end()
    requests.grow()
    requests.check()
    assert len(requests.index._rows) == 64  # what it began with


def test_a_request_that_outgrows_the_first_arrays():
    rng, index, pages = np.random.default_rng(0), SignatureIndex(SIZE, WIDTH), {}
    for page in range(150):
        pages[page] = unit_rows(rng)
        index.extend([(7, np.array([page]))], torch.from_numpy(pages[page])[None])
    np.testing.assert_allclose(index.redundancy(7), by_definition(pages, 150), atol=1e-5)


@pytest.mark.parametrize("limit", [4000, 20000])
def test_products_worked_out_at_once_have_a_limit(limit, monkeypatch):
    """Many pages that come or go together, of requests of all shapes; parts are no single pages where more fit."""
    products, multiply = [], torch.Tensor.__matmul__

    def watched(a, b):
        rows, columns = a.shape[1], b.shape[2]
        products.append(len(a) * (rows * columns + max(rows, columns) * WIDTH))  # and the signatures beside each other
        return multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    requests = Requests(np.random.default_rng(0), limit)
    counts, rng = (25, 4, 17, 5, 5, 6, 3, 3), np.random.default_rng(0)
    requests.known = dict(enumerate(counts))
    requests.resident = {name: {p: unit_rows(rng) for p in range(count)} for name, count in enumerate(counts)}
    rows = np.stack([rows for pages in requests.resident.values() for rows in pages.values()])
    requests.index.extend([(name, np.arange(count)) for name, count in enumerate(counts)], torch.from_numpy(rows))
    taken = len(products)
    for name, count in enumerate(counts):
        gone = range(count // 2, count, 2)
        requests.index.forget(name, np.array(gone))
        requests.resident[name] = {p: rows for p, rows in requests.resident[name].items() if p not in gone}
    requests.check()
    assert taken < len(products)
    for few, more in ((1, 6), (2, 1)):  # of the three longest ones, of the others
        new = [(name, np.arange(k, k + (few if name < 3 else more))) for name, k in requests.known.items()]
        for name, pages in new:
            requests.resident[name] |= {int(page): unit_rows(rng) for page in pages}
            requests.known[name] += len(pages)
        rows = np.stack([requests.resident[name][int(page)] for name, pages in new for page in pages])
        requests.index.extend(new, torch.from_numpy(rows))
    requests.check()
    assert max(products) <= limit
    assert len(products) < sum(requests.known.values())


@pytest.mark.parametrize("seed", range(3))
def test_an_error_anywhere_leaves_it_as_it_was_or_as_it_should_become(seed, monkeypatch):
    """Memory can run out in any step; the same call again comes to what it would have come to."""
    rng, countdown = np.random.default_rng(seed), [0]

    def failing(step):
        def call(*arguments):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise torch.OutOfMemoryError
            return step(*arguments)

        return call

    monkeypatch.setattr(signature_index, "_at", failing(signature_index._at))
    monkeypatch.setattr(torch, "maximum", failing(torch.maximum))
    monkeypatch.setattr(torch, "where", failing(torch.where))
    monkeypatch.setattr(SignatureIndex, "_grow", failing(SignatureIndex._grow))
    requests, caught = Requests(rng, 4000), 0
    whole = {name: getattr(requests.index, name) for name in ("extend", "redundancy")}

    def persist(name):
        def call(*arguments):
            nonlocal caught
            countdown[0] = int(rng.integers(1, 12))
            while True:
                try:
                    return whole[name](*arguments)
                except torch.OutOfMemoryError:
                    caught += 1

        return call

    for name in whole:
        monkeypatch.setattr(requests.index, name, persist(name))
    for _ in range(25):
        requests.grow()
        requests.lose()
        requests.check()
    assert caught > 20


def test_an_error_while_pages_are_taken_leaves_no_trace(monkeypatch):
    """Also where they never come again: the next page is met as if nothing had been."""
    rng, maximum = np.random.default_rng(0), torch.maximum
    rows = torch.from_numpy(np.stack([unit_rows(rng) for _ in range(4)]))
    rows[2] = rows[0]
    index = SignatureIndex(SIZE, WIDTH)
    index.extend([("a", np.array([0, 1]))], rows[:2])

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "maximum", fail)
    with pytest.raises(torch.OutOfMemoryError):
        index.extend([("a", np.array([2]))], rows[2:3])
    monkeypatch.setattr(torch, "maximum", maximum)
    index.forget("a", np.array([1]))
    index.extend([("a", np.array([3]))], rows[3:])
    expected = by_definition({0: rows[0].numpy(), 3: rows[3].numpy()}, 4)
    np.testing.assert_allclose(index.redundancy("a"), expected, atol=1e-5)


def test_tokens_that_are_not_numbers_are_like_nothing_and_leave_with_their_page():
    rng, index = np.random.default_rng(0), SignatureIndex(SIZE, WIDTH)
    pages = {page: unit_rows(rng) for page in range(5)}
    pages[2][3] = np.nan
    index.extend([(1, np.arange(5))], torch.from_numpy(np.stack([*pages.values()])))
    assert np.isfinite(index.redundancy(1)).all()
    index.forget(1, np.array([2]))
    del pages[2]
    np.testing.assert_allclose(index.redundancy(1), by_definition(pages, 5), atol=1e-5)


def test_what_is_known_is_not_signed_again():
    rows = torch.from_numpy(np.stack([unit_rows(np.random.default_rng(s)) for s in range(9)]))
    signed, index = [], SignatureIndex(SIZE, WIDTH)

    def sign(blocks):
        signed.append(blocks.tolist())
        return rows[blocks]

    index.catch_up([(1, np.arange(2, 5), np.array([7, 0, 3])), (2, np.arange(1), np.array([4]))], sign)
    index.catch_up([(2, np.arange(2), np.array([4, 1])), (1, np.arange(3, 7), np.array([0, 3, 5, 8]))], sign, 2)
    index.catch_up([(1, np.arange(2, 7), np.array([7, 0, 3, 5, 8]))], sign)
    assert signed == [[7, 0, 3, 4], [1, 5], [8]]
    pages = dict(zip(range(2, 7), rows[[7, 0, 3, 5, 8]].numpy(), strict=True))
    np.testing.assert_allclose(index.redundancy(1), by_definition(pages, 7), atol=1e-5)


def test_a_request_that_is_unknown_and_signatures_of_another_shape():
    index = SignatureIndex(SIZE, WIDTH)
    assert index.redundancy(1).shape == (0,)
    index.forget(1, np.array([1]))
    index.drop(1)
    with pytest.raises(ValueError, match=r"2 pages need signatures \[2, 8, 5\], got \[2, 8, 4\]"):
        index.extend([(1, np.array([2])), (2, np.array([0]))], torch.zeros(2, SIZE, 4))


def test_spans_are_cut_into_batches():
    spans = [
        (1, np.arange(3), np.arange(10, 13)),
        (2, np.arange(0), np.arange(0)),
        (3, np.arange(4), np.arange(20, 24)),
    ]
    found = [
        [(name, pages.tolist(), blocks.tolist()) for name, pages, blocks in batch] for batch in in_batches(spans, 5)
    ]
    assert found == [[(1, [0, 1, 2], [10, 11, 12]), (3, [0, 1], [20, 21])], [(3, [2, 3], [22, 23])]]
