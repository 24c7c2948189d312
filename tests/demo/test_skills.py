"""Pre-training documents answer their own questions rightly and never show the routing task."""

import random

import pytest

from decal.demo import QUEUES, rows
from decal.demo.language import FAMILIES
from decal.demo.pretrain import answer_flags, render
from decal.demo.skills import (
    RULE_TABLES,
    RULES,
    SKILLS,
    WORDINGS,
    Document,
    draw_documents,
    ticket_document,
)
from decal.demo.tickets import INSTRUCTION, KINDS, Mention, Ticket, house_table


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = random.Random(3)
    return [document for _ in range(1500) for document in draw_documents(rng, rules=True)]


def test_no_document_shows_the_routing_task(documents):
    """Mutation: add the routing instruction to the headers."""
    for document in documents:
        text = render(document).lower()
        assert INSTRUCTION.lower() not in text
        assert "route" not in text
        assert "queue" not in text


def test_queue_names_occur_in_copying_drills_only(documents):
    """Mutation: answer a ticket with a queue name."""
    for document in documents:
        for turn in document.turns:
            if turn.skill != "copy":
                assert not set(QUEUES) & set(turn.answer.replace(",", "").split())


def test_every_skill_occurs_in_at_least_three_forms(documents):
    """Mutation: always take the first wording."""
    assert all(len(set(forms)) >= 3 for forms in WORDINGS.values())
    seen = {turn.skill for document in documents for turn in document.turns}
    assert set(WORDINGS) <= seen
    questions = {t.question for d in documents for t in d.turns[1:] if t.skill == "family"}
    assert questions == set(WORDINGS["family"])


def test_answers_are_true_of_the_ticket():
    """Mutation: swap the main and the second mention in any of the makers."""
    main = Mention("Zorvik", "power", "", "the Zorvik dies")
    second = Mention("Havorra", "damage", "", "the Havorra is bent")
    ticket = Ticket("Last week the Havorra is bent. The Zorvik dies.", main, second, "resolved")
    truth = {
        "product": "Zorvik",
        "family": "printer",
        "kind": "power",
        "family_kind": "printer, power",
        "kind_family": "power, printer",
        "other_product": "Havorra",
        "other_kind": "damage",
        "state": "solved",
        "solved": "yes",
        "quoted": "no",
        "denied": "no",
        "count": "two",
        "extract": "Havorra, Zorvik",
        "rewrite_plain": "The Zorvik dies.",
        "rewrite_polite": "Dear team, the Zorvik dies. Could you please help?",
        "rewrite_short": "Zorvik: power",
    }
    rules = {name: table["printer", "power"] for name, table in RULE_TABLES.items()}
    truth |= rules
    seen = set()
    for seed in range(800):
        for turn in ticket_document(random.Random(seed), ticket, rules=seed % 2 == 0).turns:
            seen.add(turn.skill)
            question = turn.question.replace(ticket.text, "")
            if turn.skill in truth:
                assert turn.answer == truth[turn.skill]
            elif turn.skill == "open":
                assert turn.answer == ("yes" if "Zorvik" in question else "no")
            elif turn.skill == "check":
                right = "printer" in question and "power" in question
                assert turn.answer == ("yes" if right else "no")
            else:
                assert turn.skill == "bare"
                facts = {"power", "printer"} | (set(rules.values()) if seed % 2 == 0 else set())
                assert set(turn.answer.split(", ")) == facts
    assert seen == set(truth) | {"open", "check", "bare"}
    assert len(SKILLS) == 15


def test_house_rules_are_not_the_routing_table():
    """Mutation: make the queues a house rule, or give a rule a label of its own for each cell."""
    for name, table in RULE_TABLES.items():
        assert set(table) == set(house_table())
        assert set(table.values()) == set(RULES[name])
        assert len(RULES[name]) <= 10
        assert not set(" ".join(RULES[name]).split()) & set(QUEUES)


def test_without_rules_no_document_asks_for_one():
    """Mutation: ignore the flag."""
    rng = random.Random(4)
    plain = [turn for _ in range(300) for d in draw_documents(rng) for turn in d.turns]
    assert not {turn.skill for turn in plain} & set(RULES)


def test_device_types_and_problem_names_are_no_queues():
    """Mutation: use a family's noun as a queue name."""
    assert not (set(FAMILIES) | set(KINDS)) & set(QUEUES)
    assert all(row.queue in QUEUES for row in rows("train")[:50])


def test_answer_flags_cover_the_answer_and_its_end():
    """Mutation: start one token late, or leave the end token out."""
    header, end = [1, 7, 9], 2
    ids = [1, 5, 9, 4, 2, 9, 1, 7, 9, 30, 31, 2, 9, 1, 7, 9, 32, 2]
    flagged = [
        token for token, flag in zip(ids, answer_flags(ids, header, end), strict=True) if flag
    ]
    assert flagged == [30, 31, 2, 32, 2]
