"""The task of the bundled model: chained sums, worked digit by digit and re-checked in varied wording.

Generates problems and the transcripts the model is trained on. How often a transcript repeats itself is decided
here, by ``CHECK_STYLES``, and not by nature: figures on this task say how a method behaves at that redundancy, and
the redundancy is printed beside that of real traces (``trtllm_memshare.evaluation.redundancy``).

A transcript, with ``|`` for line starts (the prompt is the first line)::

    |Q: 51 + 142 = ?
    |<think>
    |51 + 142: 1+2=3, 5+4=9, 0+1=1, so 193.         one line per operation: ones, tens, hundreds
    |Total 193.
    |
    |Wait, check 1: the same way again.             a re-check; its wording follows from the problem
    |51 + 142: 1+2=3, 5+4=9, 0+1=1, so 193.
    |Total 193, as before.
    |
    |The answer is 193.
    |</think>
    |193<eos>
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

MAX_TOTAL = 999
MIN_TERMS, MAX_TERMS = 2, 8

RESTATED, PARAPHRASED, REORDERED = "R", "P", "O"

CHECK_STYLES: dict[int, str] = {
    0: "RRRR", 1: "R", 2: "RRRR", 3: "RRR", 4: "RRRP", 5: "RPRR", 6: "RROR", 7: "PO", 8: "OP", 9: "RR",
}  # fmt: skip
"""Wordings of the re-checks, by the ones digit of the first term: greedy decoding of a model trained on randomly
chosen wordings would always pick the commonest one, so the choice is a function of the problem."""

HARD_DIGITS = (7, 8)
"""Ones digits whose re-checks are all paraphrased or reordered: the `hard` data set."""

REPETITIVE_DIGITS = (0, 2)
"""Ones digits with four re-checks, all restated: the `repetitive` data set, the other end of the scale."""

_HEADERS = {RESTATED: "the same way again", PARAPHRASED: "in other words", REORDERED: "hundreds first"}
_HELD_OUT_MODULUS = 50


@dataclass(frozen=True)
class Problem:
    """A chained sum. ``terms``: signed ints, the first positive; every running total lies in [0, 999]."""

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The text given to the model, one line."""
        chain = str(self.terms[0]) + "".join(f" {'+' if t > 0 else '-'} {abs(t)}" for t in self.terms[1:])
        return f"Q: {chain} = ?\n"

    @property
    def answer(self) -> int:
        return sum(self.terms)

    @property
    def check_styles(self) -> str:
        """Wordings of the re-checks in order, see ``CHECK_STYLES``."""
        return CHECK_STYLES[self.terms[0] % 10]

    @property
    def is_held_out(self) -> bool:
        """True for the one problem in fifty that training never sees and every data set is drawn from."""
        return zlib.crc32(self.prompt.encode()) % _HELD_OUT_MODULUS == 0


def sample_problem(
    rng: random.Random, num_terms: int, *, held_out: bool, digits: tuple[int, ...] = tuple(range(10))
) -> Problem:
    """Draws a problem with ``num_terms`` distinct terms from the training or the held-out side.

    Args:
      rng: source of randomness; the same state gives the same problem.
      num_terms: terms of the chain, 2 to 8.
      held_out: which side of the split.
      digits: ones digits that the first term may have; they decide the wording of the re-checks.

    Raises:
      ValueError: num_terms out of range.
    """
    if not MIN_TERMS <= num_terms <= MAX_TERMS:
        raise ValueError(f"num_terms must be between {MIN_TERMS} and {MAX_TERMS}, got {num_terms}")
    while True:
        terms = [rng.randint(1, MAX_TOTAL)]
        if terms[0] % 10 not in digits:
            continue
        total = terms[0]
        for _ in range(num_terms - 1):
            adds = rng.random() < 0.5
            room = MAX_TOTAL - total if adds else total
            if room == 0:
                adds, room = not adds, MAX_TOTAL - room
            # Half of the terms have a uniformly chosen number of digits: small numbers would be rare otherwise.
            limit = min(room, 10 ** rng.randint(1, 3) - 1) if rng.random() < 0.5 else room
            term = rng.randint(1, limit)
            terms.append(term if adds else -term)
            total += terms[-1]
        problem = Problem(tuple(terms))
        # Distinct terms: a number's place in the chain is then found by its digits alone.
        if len({abs(t) for t in terms}) == num_terms and problem.is_held_out == held_out:
            return problem


def transcript(problem: Problem, rng: random.Random, slip_rate: float = 0.0) -> str:
    """What a careful reasoner writes after the prompt, without the end token.

    Args:
      slip_rate: probability that one pass before the last goes wrong in one digit, which the next pass mends.
    """
    passes = RESTATED + problem.check_styles
    slipped_pass = rng.randrange(len(passes) - 1) if rng.random() < slip_rate else -1
    out = ["<think>\n"]
    previous_total: int | None = None
    for index, style in enumerate(passes):
        if index:
            out.append(f"Wait, check {index}: {_HEADERS[style]}.\n")
        lines, total = _work(problem, style, rng if index == slipped_pass else None)
        out.extend(lines)
        if previous_total is None:
            out.append(f"Total {total}.\n\n")
        elif previous_total == total:
            out.append(f"Total {total}, as before.\n\n")
        else:
            out.append(f"Total {total}, not {previous_total}: I slipped.\n\n")
        previous_total = total
    out.append(f"The answer is {problem.answer}.\n</think>\n{problem.answer}")
    return "".join(out)


def parse_answer(text: str) -> int | None:
    """The number after ``</think>``, or None if the text has none."""
    tail = text.partition("</think>")[2].strip()
    return int(tail) if tail.isdigit() else None


def _work(problem: Problem, style: str, slip: random.Random | None) -> tuple[list[str], int]:
    """Lines of one pass and the total it arrives at; ``slip`` makes one result wrong if a legal one exists."""
    slip_at = slip.randrange(1, len(problem.terms)) if slip else -1
    total, lines = problem.terms[0], []
    for index, term in enumerate(problem.terms[1:], start=1):
        columns, result = _columns(total, term)
        if slip is not None and index == slip_at:
            columns, result = _slip(columns, result, problem.terms[index + 1 :], slip)
        lines.append(_LINES[style](total, term, columns, result))
        total = result
    return lines, total


@dataclass(frozen=True)
class _Column:
    left: int
    right: int
    carry: int  # carried or borrowed in
    out: str  # as written: "10" carries, "6b" borrows

    @property
    def digit(self) -> int:
        return int(self.out.rstrip("b")) % 10


def _columns(total: int, term: int) -> tuple[list[_Column], int]:
    """Ones, tens and hundreds of ``total + term``."""
    sign, carry, columns = (1 if term > 0 else -1), 0, []
    for power in (1, 10, 100):
        left, right = total // power % 10, abs(term) // power % 10
        value = left + sign * (right + carry)
        out = f"{value % 10}b" if value < 0 else str(value)
        columns.append(_Column(left, right, carry, out))
        carry = int(value < 0 or value > 9)
    return columns, total + term


def _slip(columns: list[_Column], result: int, rest: tuple[int, ...], rng: random.Random) -> tuple[list[_Column], int]:
    """One column's digit off by one or two, if every later running total stays in range."""
    candidates = []
    for place, column in enumerate(columns):
        for delta in (-2, -1, 1, 2):
            wrong = result + delta * 10**place
            totals = [wrong + sum(rest[:i]) for i in range(len(rest) + 1)]
            if 0 <= column.digit + delta <= 9 and all(0 <= t <= MAX_TOTAL for t in totals):
                out = column.out.replace(str(column.digit), str(column.digit + delta))
                if len(column.out.rstrip("b")) == 2:
                    out = column.out[0] + str(column.digit + delta)
                candidates.append((place, _Column(column.left, column.right, column.carry, out), wrong))
    if not candidates:
        return columns, result
    place, column, wrong = rng.choice(candidates)
    return [column if i == place else c for i, c in enumerate(columns)], wrong


def _restated(total: int, term: int, columns: list[_Column], result: int) -> str:
    sign = "+" if term > 0 else "-"
    work = ", ".join(f"{c.left}{sign}{c.right}{f'{sign}1' if c.carry else ''}={c.out}" for c in columns)
    return f"{total} {sign} {abs(term)}: {work}, so {result}.\n"


def _reordered(total: int, term: int, columns: list[_Column], result: int) -> str:
    return _restated(total, term, columns[::-1], result)


def _paraphrased(total: int, term: int, columns: list[_Column], result: int) -> str:
    joint, verb, makes = ("and", "add", "make") if term > 0 else ("less", "take", "leave")
    work = ", ".join(
        f"{name} {c.left} {joint} {c.right}{f' {joint} 1' if c.carry else ''} {makes} {c.out}"
        for name, c in zip(("ones", "tens", "hundreds"), columns, strict=True)
    )
    return f"From {total} {verb} {abs(term)}: {work}. Now {result}.\n"


_LINES = {RESTATED: _restated, REORDERED: _reordered, PARAPHRASED: _paraphrased}
