"""Pre-training documents: tickets with questions about them, product sheets and word drills.

Pure functions of a random generator. This file does not know the routing task: no document asks for
a queue, and queue names only occur in drills that copy arbitrary words. Tickets come from the
training split's fillings alone, so the test split's fillings stay new to the base model.

Why the first turn is often a bare ticket: the reply then begins with the device type or with the
problem, at random. A model that predicts this well holds both at the position where an answer
starts, which is what fine-tuning reads. Asking one fixed question there would leave the other fact
to be found later.

House rules: a desk has tables that are looked up by device type and problem together (which form,
which shelf, who signs, how soon). Four such tables, with labels of their own, are taught last. They
say nothing about queues, but a model that answers them holds the combination, not only the parts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from decal.demo.language import DISTRACTORS, FAMILIES, QUEUES
from decal.demo.tickets import (
    FAMILY_OF,
    KINDS,
    PRODUCTS,
    Split,
    Ticket,
    capital,
    draw_pair,
    draw_ticket,
)

STATES = {"resolved": "solved", "negated": "denied", "quoted": "quoted", None: "none"}
WORDS = tuple(QUEUES) * 3 + tuple(FAMILIES) + KINDS + PRODUCTS + ("yes", "no", "none", "one", "two")


@dataclass(frozen=True)
class Turn:
    """One exchange: what the user says, what the assistant answers, and the skill it exercises."""

    question: str
    answer: str
    skill: str


@dataclass(frozen=True)
class Document:
    """A conversation, or plain text where `turns` is empty."""

    turns: tuple[Turn, ...] = ()
    text: str = ""


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def ask(skill: str, rng: random.Random, answer: str) -> Turn:
    return Turn(rng.choice(WORDINGS[skill]), answer, skill)


def other_product(ticket: Ticket, rng: random.Random) -> Turn:
    return ask("other_product", rng, ticket.second.product if ticket.second else "none")


def other_kind(ticket: Ticket, rng: random.Random) -> Turn:
    kind = ticket.second.kind if ticket.second else None
    return ask("other_kind", rng, kind or "none")


def both(ticket: Ticket, rng: random.Random) -> Turn:
    skill = rng.choice(("family_kind", "kind_family"))
    facts = (ticket.main.family, str(ticket.main.kind))
    return ask(skill, rng, ", ".join(facts if skill == "family_kind" else facts[::-1]))


def still_open(ticket: Ticket, rng: random.Random) -> Turn:
    """Is the matter of a product open? The product is the main one or the second one."""
    second = ticket.second
    chosen = second if second is not None and rng.random() < 0.5 else ticket.main
    question = rng.choice(WORDINGS["open"]).format(p=chosen.product)
    return Turn(question, yes(chosen is ticket.main), "open")


def check(ticket: Ticket, rng: random.Random) -> Turn:
    """A device type and a problem, right half of the time; the second mention lends wrong ones."""
    family, kind = ticket.main.family, str(ticket.main.kind)
    if rng.random() < 0.5:
        second = ticket.second
        near = second is not None and rng.random() < 0.6
        wrong_family = second.family if near and second else rng.choice(tuple(FAMILIES))
        wrong_kind = (second.kind if near and second else None) or rng.choice(KINDS)
        family, kind = rng.choice(
            ((wrong_family, wrong_kind), (family, wrong_kind), (wrong_family, kind))
        )
    truth = (family, kind) == (ticket.main.family, ticket.main.kind)
    return Turn(rng.choice(WORDINGS["check"]).format(f=family, k=kind), yes(truth), "check")


def named_products(ticket: Ticket) -> list[str]:
    """The products in the order of the text."""
    names = {ticket.main.product} | ({ticket.second.product} if ticket.second else set())
    return sorted(names, key=ticket.text.index)


def count(ticket: Ticket, rng: random.Random) -> Turn:
    return ask("count", rng, ("one", "two")[len(named_products(ticket)) - 1])


def extract(ticket: Ticket, rng: random.Random) -> Turn:
    return ask("extract", rng, ", ".join(named_products(ticket)))


def rewrite(ticket: Ticket, rng: random.Random) -> Turn:
    skill = rng.choice(("rewrite_plain", "rewrite_polite", "rewrite_short"))
    clause = ticket.main.clause
    answer = {
        "rewrite_plain": f"{capital(clause)}.",
        "rewrite_polite": f"Dear team, {clause}. Could you please help?",
        "rewrite_short": f"{ticket.main.product}: {ticket.main.kind}",
    }[skill]
    return ask(skill, rng, answer)


def rule_table(rule: str) -> dict[tuple[str, str], str]:
    """(family, kind) -> label of one house rule: a fixed draw in which labels are about even."""
    labels = RULES[rule]
    cells = [(family, kind) for family in FAMILIES for kind in KINDS]
    drawn = [labels[i % len(labels)] for i in range(len(cells))]
    random.Random(f"rule {rule}").shuffle(drawn)
    return dict(zip(cells, drawn, strict=True))


def rule(name: str, ticket: Ticket, rng: random.Random) -> Turn:
    return ask(name, rng, RULE_TABLES[name][ticket.main.family, str(ticket.main.kind)])


RULES: dict[str, tuple[str, ...]] = {
    "form": ("A", "B", "C", "D", "E", "F", "G", "H"),
    "shelf": tuple(f"shelf {n}" for n in ("one", "two", "three", "four", "five", "six")),
    "signer": ("Anna", "Ben", "Mara", "Tom", "Rita", "Paul", "Nora", "Otto", "Lena", "Max"),
    "speed": ("today", "Monday", "in a week", "in a month"),
}
RULE_TABLES = {name: rule_table(name) for name in RULES}

WORDINGS: dict[str, tuple[str, ...]] = {
    "form": ("Which form is needed?", "Name the form.", "Form?"),
    "shelf": ("Where is the guide?", "Which shelf has the guide?", "Shelf?"),
    "signer": ("Who signs?", "Who has to sign the answer?", "Name who signs."),
    "speed": ("How soon must we answer?", "When is the answer due?", "Due?"),
    "product": (
        "Which product is it about?",
        "Name the product with the trouble.",
        "What does the writer need help with?",
        "Main product?",
        "Tell me the product.",
    ),
    "family": (
        "What sort of device is it?",
        "Name the device type.",
        "Which device type has the trouble?",
        "Device type?",
        "What kind of machine is it about?",
    ),
    "kind": (
        "What is the main problem?",
        "Name the problem.",
        "Problem type?",
        "What went wrong?",
        "Which sort of trouble is it?",
    ),
    "family_kind": (
        "Device type and problem?",
        "Name the device type, then the problem.",
        "First the device, then the trouble.",
    ),
    "kind_family": (
        "Problem and device type?",
        "Name the problem, then the device type.",
        "First the trouble, then the device.",
    ),
    "other_product": (
        "Which other product is named?",
        "What product is named only in passing?",
        "Name the product that needs no help.",
        "Other product?",
    ),
    "other_kind": (
        "Which problem is named only in passing?",
        "What problem needs no help?",
        "Name the problem that is not the main one.",
        "Other problem?",
    ),
    "state": (
        "What about the other matter?",
        "Is the other matter solved, denied or quoted?",
        "State of the other matter?",
        "Tell me why the other matter needs no help.",
    ),
    "solved": (
        "Is an older matter solved?",
        "Has something been solved?",
        "Does the writer call something solved?",
    ),
    "quoted": (
        "Is somebody quoted?",
        "Does the writer quote a text?",
        "Are there words of somebody else?",
    ),
    "denied": (
        "Is something denied?",
        "Does the writer deny a problem?",
        "Is a problem ruled out?",
    ),
    "open": (
        "Is the {p} matter open?",
        "Does the {p} need help?",
        "Must we look into the {p}?",
        "Is it about the {p}?",
    ),
    "check": (
        "Is it a {k} problem of a {f}?",
        "Does a {f} have a {k} problem?",
        "True or not: {f}, {k}?",
        "Main problem {k}, device type {f}?",
    ),
    "count": (
        "How many products are named?",
        "Count the products.",
        "Number of products?",
    ),
    "extract": (
        "List the products.",
        "Which products are named?",
        "Write down all product names.",
        "Products in order?",
    ),
    "rewrite_plain": (
        "Write only the main problem.",
        "Copy the part that matters.",
        "Say it in one plain sentence.",
    ),
    "rewrite_polite": ("Rewrite it politely.", "Make it polite and short.", "Put it kindly."),
    "rewrite_short": ("Give it a title.", "Write a short title.", "Title?"),
}
"""Skill -> the forms of its instruction."""

SKILLS: tuple[tuple[int, Callable[[Ticket, random.Random], Turn]], ...] = (
    (3, lambda ticket, rng: ask("product", rng, ticket.main.product)),
    (4, lambda ticket, rng: ask("family", rng, ticket.main.family)),
    (4, lambda ticket, rng: ask("kind", rng, str(ticket.main.kind))),
    (4, both),
    (2, other_product),
    (2, other_kind),
    (2, lambda ticket, rng: ask("state", rng, STATES[ticket.state])),
    (1, lambda ticket, rng: ask("solved", rng, yes(ticket.state == "resolved"))),
    (1, lambda ticket, rng: ask("quoted", rng, yes(ticket.state == "quoted"))),
    (1, lambda ticket, rng: ask("denied", rng, yes(ticket.state == "negated"))),
    (2, still_open),
    (4, check),
    (1, count),
    (1, extract),
    (1, rewrite),
)
"""Weight and maker of each question about a ticket."""

RULE_SKILLS = tuple((5, partial(rule, name)) for name in RULES)
"""The house rules, taught after the others."""

HEADERS = (
    "New ticket:",
    "Ticket:",
    "Read this ticket.",
    "A customer writes:",
    "From the inbox:",
    "Mail:",
    "Incoming:",
    "Look at this.",
    "Message of a customer:",
)


def bare_turn(ticket: Ticket, rng: random.Random, rules: bool) -> Turn:
    """The ticket without a question; the reply is what the desk notes down, in any order.

    That is device type and problem, and with `rules` what the house rules say of these.
    """
    header = f"{rng.choice(HEADERS)}\n" if rng.random() < 0.6 else ""
    facts = [ticket.main.family, str(ticket.main.kind)]
    if rules:
        facts += [
            table[ticket.main.family, str(ticket.main.kind)] for table in RULE_TABLES.values()
        ]
    rng.shuffle(facts)
    return Turn(header + ticket.text, ", ".join(facts), "bare")


def ticket_document(rng: random.Random, ticket: Ticket, rules: bool) -> Document:
    """A ticket and different questions about it, the first one beside the ticket or left out."""
    skills = SKILLS + RULE_SKILLS if rules else SKILLS
    weights = [weight for weight, _ in skills]
    makers = list(dict.fromkeys(maker for _, maker in rng.choices(skills, weights, k=7)))
    turns = [maker(ticket, rng) for maker in makers]
    if rng.random() < 0.6:
        return Document((bare_turn(ticket, rng, rules), *turns))
    first = turns[0]
    parts = [first.question, ticket.text]
    question = "\n".join(parts if rng.random() < 0.6 else parts[::-1])
    return Document((Turn(question, first.answer, first.skill), *turns[1:]))


def product_document(rng: random.Random) -> Document:
    """What products are: questions about single ones, or a sheet in plain text."""
    names = rng.sample(PRODUCTS, 5)
    if rng.random() < 0.4:
        forms = ("The {p} is a {f}.", "{p}: {f}.", "Our {f} is called {p}.", "{p}, a {f}.")
        form = rng.choice(forms)
        return Document(text=" ".join(form.format(p=name, f=FAMILY_OF[name]) for name in names))
    forms = ("What is the {p}?", "{p}?", "Which device type is the {p}?", "What do we sell as {p}?")
    turns = [Turn(rng.choice(forms).format(p=name), FAMILY_OF[name], "sheet") for name in names]
    return Document(tuple(turns))


def drill_document(rng: random.Random) -> Document:
    """Copying arbitrary words and sentences, so that no word's embedding stays untrained."""
    turns = []
    for _ in range(4):
        words = rng.sample(WORDS, rng.choice((1, 1, 2, 3)))
        form = rng.choice(("Say {w}.", "Write {w}", "Repeat: {w}", "Copy the words {w}."))
        turns.append(Turn(form.format(w=" ".join(words)), " ".join(words), "copy"))
    if rng.random() < 0.2:
        sentence = rng.choice(DISTRACTORS)
        turns.append(Turn(f"Repeat: {sentence}", sentence, "copy"))
    return Document(tuple(turns))


def draw_documents(
    rng: random.Random, split: Split = "train", hard: float = 1.0, rules: bool = False
) -> list[Document]:
    """One random document, or two about the members of a pair of tickets with the same words.

    `hard` in [0, 1] says how many tickets have a second mention; easy text has more sheets and
    drills. With `rules` the house rules are asked for too.
    """
    share = 0.15 - 0.10 * hard
    kind = rng.random()
    if kind < share:
        return [product_document(rng)]
    if kind < 2 * share:
        return [drill_document(rng)]
    if kind < 2 * share + 0.2 * hard:
        return [ticket_document(rng, ticket, rules) for ticket in draw_pair(rng, split)]
    return [ticket_document(rng, draw_ticket(rng, split, second_share=0.75 * hard), rules)]
