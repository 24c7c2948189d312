"""Tickets of the invented support desk, and the rows of the routing task made from them.

Pure functions of a seed. This file does not know about tokens, models or pre-training documents.

How the two splits stay apart: every (sentence template, product) filling belongs to exactly one
split, chosen by a checksum of its text. A ticket of a split uses only that split's fillings, for
the main matter as well as for the second mention, so no filling is in both. Pre-training draws from
the training split too; the test split's fillings are new to the base model and to the adapter.

How contrast pairs work: two clauses go into the same frames in both orders (or keep their places
and exchange products). The tickets are then permutations of the same words, and only the order says
which of the two matters is the main one.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from decal.demo.language import (
    CLAUSES,
    CLOSINGS,
    DISTRACTORS,
    FAMILIES,
    GREETINGS,
    JOINT_FRAMES,
    MAIN_FRAMES,
    MONEY,
    QUEUES,
    SECOND_FRAMES,
    TIMES,
)

Split = Literal["train", "test"]
INSTRUCTION = "Route this ticket:"
TRAIN_ROWS, TEST_ROWS, TEST_PAIRS = 6400, 2400, 250
KINDS = tuple(CLAUSES)
FAMILY_OF = {product: family for family, products in FAMILIES.items() for product in products}
PRODUCTS = tuple(FAMILY_OF)
TEST_SHARE = 4
"""One filling in four belongs to the test split."""


@dataclass(frozen=True)
class Mention:
    """One product with one problem (`kind` None: the product alone); `clause` is the statement."""

    product: str
    kind: str | None
    template: str
    clause: str

    @property
    def family(self) -> str:
        return FAMILY_OF[self.product]


@dataclass(frozen=True)
class Ticket:
    """A ticket and what is true of it. `state` is that of the second mention, None without one."""

    text: str
    main: Mention
    second: Mention | None
    state: str | None

    @property
    def fillings(self) -> tuple[tuple[str, str], ...]:
        """The (template, product) pairs used."""
        mentions = (self.main,) if self.second is None else (self.main, self.second)
        return tuple((mention.template, mention.product) for mention in mentions)


@dataclass(frozen=True)
class TicketRow:
    """One row of the routing task, with what evaluation wants to know about it.

    `pair` numbers the contrast pair that the row is a member of, or is None; `second` is the state
    of the second mention ("resolved", "negated", "quoted") or None.
    """

    prompt: str
    queue: str
    family: str
    kind: str
    pair: int | None
    second: str | None
    fillings: tuple[tuple[str, str], ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The row as a chat: the user's prompt, the assistant's queue name."""
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.queue},
        ]


@cache
def house_table() -> dict[tuple[str, str], str]:
    """(family, kind) -> queue: one fixed shuffle of the 48 names."""
    cells = [(family, kind) for family in FAMILIES for kind in KINDS]
    names = list(QUEUES)
    random.Random(48).shuffle(names)
    return dict(zip(cells, names, strict=True))


def filling_split(template: str, product: str) -> Split:
    """The split that owns a filling: a checksum of its text, so it never depends on a seed."""
    checksum = zlib.crc32(f"{template}|{product}".encode())
    return "test" if checksum % TEST_SHARE == 0 else "train"


def make_mention(rng: random.Random, template: str, kind: str | None, product: str) -> Mention:
    """Fill a template's slots with the product, a time and a sum of money."""
    clause = template.format(p=product, t=rng.choice(TIMES), m=rng.choice(MONEY))
    return Mention(product, kind, template, clause)


def draw_mention(rng: random.Random, split: Split) -> Mention:
    """A random product with a random problem whose filling belongs to the split."""
    while True:
        kind, product = rng.choice(KINDS), rng.choice(PRODUCTS)
        template = rng.choice(CLAUSES[kind])
        if filling_split(template, product) == split:
            return make_mention(rng, template, kind, product)


def draw_second(rng: random.Random, split: Split, main: Mention) -> Mention:
    """A mention of another product, usually of another family, that belongs to another queue."""
    while True:
        second = draw_mention(rng, split)
        if second.product == main.product:
            continue
        if (second.family, second.kind) != (main.family, main.kind):
            return second


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill_frame(frame: str, main: str, second: str = "") -> str:
    """Put clauses into a frame; capital slot letters start a sentence. `{c}` is the main clause."""
    return frame.format(c=main, C=capital(main), a=main, A=capital(main), b=second)


@dataclass(frozen=True)
class Layout:
    """Everything about a ticket except its clauses: frames, their order and the small talk."""

    main_frame: str
    second_frame: str | None
    joint: bool
    second_first: bool
    before: tuple[str, ...]
    middle: tuple[str, ...]
    after: tuple[str, ...]

    def render(self, main: str, second: str | None) -> str:
        """The ticket's text for the two clauses (the second None: there is no second mention)."""
        if second is None or self.second_frame is None:
            body = [fill_frame(self.main_frame, main)]
        elif self.joint:
            body = [fill_frame(self.second_frame, main, second)]
        else:
            body = [fill_frame(self.main_frame, main), fill_frame(self.second_frame, second)]
            body = body[::-1] if self.second_first else body
        middle = self.middle if len(body) == 2 else ()
        return " ".join((*self.before, body[0], *middle, *body[1:], *self.after))


def draw_layout(rng: random.Random, state: str | None, whole_clause: bool) -> Layout:
    """Random frames for a state; `whole_clause` leaves out frames that name a product alone."""
    frame, joint = None, False
    if state is not None:
        joint = rng.random() < 0.35
        frames = (JOINT_FRAMES if joint else SECOND_FRAMES)[state]
        frame = rng.choice([f for f in frames if not (whole_clause and "{p}" in f)])
    before = [rng.choice(GREETINGS)] if rng.random() < 0.35 else []
    middle: list[str] = []
    after: list[str] = []
    if rng.random() < 0.45:
        place = (
            rng.choice((before, middle, after))
            if state and not joint
            else rng.choice((before, after))
        )
        place.append(rng.choice(DISTRACTORS))
    if rng.random() < 0.25:
        after.append(rng.choice(CLOSINGS))
    second_first = rng.random() < 0.5
    return Layout(
        rng.choice(MAIN_FRAMES),
        frame,
        joint,
        second_first,
        tuple(before),
        tuple(middle),
        tuple(after),
    )


def add_typos(rng: random.Random, text: str) -> str:
    """Misspell one or two lower-case words of four letters or more (product names stay whole)."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if re.fullmatch(r"[a-z]{4,}", word)]
    for place in rng.sample(places, min(len(places), rng.choice((1, 1, 2)))):
        word = words[place]
        at = rng.randrange(1, len(word) - 1)
        words[place] = rng.choice(
            (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
            )
        )
    return " ".join(words)


def draw_ticket(rng: random.Random, split: Split, second_share: float = 0.6) -> Ticket:
    """One random ticket of a split, with a second mention in `second_share` of all draws."""
    main = draw_mention(rng, split)
    state = rng.choice(tuple(SECOND_FRAMES)) if rng.random() < second_share else None
    layout = draw_layout(rng, state, whole_clause=False)
    second = draw_second(rng, split, main) if state else None
    if second is not None and layout.second_frame is not None and "{p}" in layout.second_frame:
        while filling_split(layout.second_frame, second.product) != split:
            second = draw_second(rng, split, main)
        second = make_mention(rng, layout.second_frame, None, second.product)
        text = product_only(layout, main.clause, second.clause)
    else:
        text = layout.render(main.clause, second.clause if second else None)
    if rng.random() < 0.3:
        text = add_typos(rng, text)
    return Ticket(text, main, second, state)


def product_only(layout: Layout, main: str, sentence: str) -> str:
    """The text where the second mention is a whole sentence without a problem in it."""
    return replace(layout, second_frame="{c}").render(main, sentence)


def draw_pair(rng: random.Random, split: Split) -> tuple[Ticket, Ticket]:
    """Two tickets that are permutations of the same words and belong to different queues."""
    while True:
        one = draw_mention(rng, split)
        two = draw_second(rng, split, one)
        if rng.random() < 0.5:
            other = (two, one)
        else:
            pieces = ((one, two.product), (two, one.product))
            if any(
                filling_split(mention.template, product) != split for mention, product in pieces
            ):
                continue
            other = (exchange_product(*pieces[0]), exchange_product(*pieces[1]))
        if (one.family, one.kind) != (other[0].family, other[0].kind):
            break
    state = rng.choice(tuple(SECOND_FRAMES))
    layout = draw_layout(rng, state, whole_clause=True)
    return (
        Ticket(layout.render(one.clause, two.clause), one, two, state),
        Ticket(layout.render(other[0].clause, other[1].clause), *other, state),
    )


def exchange_product(mention: Mention, product: str) -> Mention:
    """The same statement about another product."""
    clause = mention.clause.replace(mention.product, product)
    return Mention(product, mention.kind, mention.template, clause)


def to_row(ticket: Ticket, pair: int | None) -> TicketRow:
    """A ticket as a row of the routing task."""
    family, kind = ticket.main.family, ticket.main.kind
    assert kind is not None  # the main mention always has a problem
    queue = house_table()[family, kind]
    prompt = f"{INSTRUCTION}\n{ticket.text}"
    return TicketRow(prompt, queue, family, kind, pair, ticket.state, ticket.fillings)


@cache
def task_rows(split: Split) -> tuple[TicketRow, ...]:
    """All rows of a split, distinct in text, in a fixed random order."""
    rng = random.Random(f"decal demo {split}")
    rows: dict[str, TicketRow] = {}
    pairs = TEST_PAIRS if split == "test" else 0
    number = 0
    while number < pairs:
        members = [to_row(ticket, number) for ticket in draw_pair(rng, split)]
        if not any(row.prompt in rows for row in members):
            rows.update({row.prompt: row for row in members})
            number += 1
    while len(rows) < (TEST_ROWS if split == "test" else TRAIN_ROWS):
        row = to_row(draw_ticket(rng, split), None)
        rows.setdefault(row.prompt, row)
    result = list(rows.values())
    rng.shuffle(result)
    return tuple(result)
