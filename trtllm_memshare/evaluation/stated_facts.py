"""Facts that are stated once inside real reasoning text, and questions about them at its end.

Each text holds facts of several kinds, so that a question can be asked of each at the price of one pass. A kind with
several statements is there to find what looks redundant and is not: a value that changed, two people of one surname.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

_FIRST = ("Quentin", "Isolde", "Tobias", "Odette", "Lucan", "Brenna", "Corwin", "Halima", "Edgar", "Miriam", "Victor")
_LAST = ("Marlowe", "Farrow", "Bennett", "Sinclair", "Draper", "Holloway", "Prescott", "Whitman", "Langley", "Mercer")
_CITIES = ("Lisbon", "Vienna", "Dublin", "Toronto", "Cairo", "Oslo", "Madrid", "Athens", "Warsaw", "Seattle", "Denver")
_THINGS = ("lantern", "violin", "compass", "telescope", "umbrella", "notebook", "hammer", "blanket", "bicycle")
_LETTERS = "KLMPQRSTUVW"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      kind: of fact, see ``KINDS``.
      statements: sentences that are put into the text, in this order; the last one is asked for.
      ask: how the question begins; ``answer`` follows it.
    """

    kind: str
    statements: tuple[str, ...]
    ask: str
    answer: str


def _code(rng: random.Random) -> Question:
    name, code = rng.choice(_FIRST), _digits(rng, 4)
    return Question("code", (f"Note: the secret code of {name} is {code}.",), f"the secret code of {name} is", code)


def _person(rng: random.Random) -> Question:
    first, last, city = rng.choice(_FIRST), rng.choice(_LAST), rng.choice(_CITIES)
    said = f"By the way, the mayor of {city} is called {first} {last}."
    return Question("name", (said,), f"the mayor of {city} is called", f"{first} {last}")


def _place(rng: random.Random) -> Question:
    thing, city = rng.choice(_THINGS), rng.choice(_CITIES)
    return Question("place", (f"Remember that the {thing} was found in {city}.",), f"the {thing} was found in", city)


def _definition(rng: random.Random) -> Question:
    letter, value = rng.choice(_LETTERS), _digits(rng, 3)
    return Question("definition", (f"Let ${letter} = {value}$.",), f"Recall that ${letter} =", value)


def _changed(rng: random.Random) -> Question:
    thing = rng.choice(_THINGS)
    old, new = rng.sample(range(12, 99), 2)
    said = (f"The price of the {thing} is {old} dollars.", f"The price of the {thing} is now {new} dollars.")
    return Question("changed", said, f"Now the price of the {thing} is", str(new))


def _surname(rng: random.Random) -> Question:
    (one, other), last, things = rng.sample(_FIRST, 2), rng.choice(_LAST), rng.sample(_THINGS, 2)
    said = tuple(f"{first} {last} bought a {thing}." for first, thing in zip((one, other), things, strict=True))
    return Question("surname", said, f"{other} {last} bought a", things[1])


def _latest(rng: random.Random) -> Question:
    cities = rng.sample(_CITIES, 3)
    said = [f"Update: the meeting is in {city}." for city in cities[:2]]
    said.append(f"Last update: the meeting is in {cities[2]}.")
    return Question("latest", tuple(said), "Last update: the meeting is in", cities[2])


KINDS = (_code, _person, _place, _definition, _changed, _surname, _latest)


@dataclass(frozen=True)
class AskedText:
    """A text with facts in it, and its questions as token ids.

    Attributes:
      ids: prompt and text, whole pages.
      questions: in the order of ``asks``.
      asks: ask and answer of each, token ids.
      answer_lengths: how many of them are answer.
      places: first and last token of the statement that is asked for, of each question.
    """

    ids: list[int]
    num_prompt_tokens: int
    questions: list[Question]
    asks: list[list[int]]
    answer_lengths: list[int]
    places: list[tuple[int, int]]


def make_asked_text(
    prompt: list[int], body: list[int], tokenizer: Any, num_tokens: int, seed: int, quiet_tokens: int = 160
) -> AskedText:
    """Puts one fact of each kind into a text.

    The statements of all kinds are shuffled, those of one kind stay in order, and are spread evenly over the text
    between the first ``quiet_tokens`` generated tokens and the last.

    Args:
      prompt, body: token ids of a real text.
      num_tokens: length of prompt and text with the facts in it, in tokens.
    """
    rng = random.Random(seed)
    questions = [kind(rng) for kind in KINDS]
    order = [i for i, q in enumerate(questions) for _ in q.statements]
    rng.shuffle(order)
    said = [0] * len(questions)
    places: list[tuple[int, int]] = [(0, 0)] * len(questions)
    room = num_tokens - len(prompt) - 2 * quiet_tokens
    ids, used = [*prompt, *body[:quiet_tokens]], quiet_tokens
    for slot, i in enumerate(order):
        more = max(0, len(prompt) + quiet_tokens + round(room * slot / len(order)) - len(ids))
        ids += body[used : used + more]
        used += more
        question = questions[i]
        statement = _tokens(tokenizer, f"\n\n{question.statements[said[i]]}\n\n")
        if said[i] == len(question.statements) - 1:
            places[i] = (len(ids), len(ids) + len(statement) - 1)
        ids += statement
        said[i] += 1
    ids += body[used : used + num_tokens - len(ids)]
    asks = [_tokens(tokenizer, f"\n\nRecall: {q.ask}") for q in questions]
    answers = [_tokens(tokenizer, f" {q.answer}") for q in questions]
    return AskedText(
        ids[:num_tokens],
        len(prompt),
        questions,
        [ask + answer for ask, answer in zip(asks, answers, strict=True)],
        [len(answer) for answer in answers],
        places,
    )


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randint(10 ** (count - 1), 10**count - 1))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
