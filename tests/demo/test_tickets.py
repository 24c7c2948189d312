"""The routing task is what it says: counts, splits that share nothing, pairs of the same words."""

import random
import re
from collections import Counter

import pytest

from decal.demo import QUEUES, TicketRow, rows, tickets
from decal.demo.language import CLAUSES, DISTRACTORS, FAMILIES, JOINT_FRAMES, SECOND_FRAMES


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def pairs() -> dict[int, list[TicketRow]]:
    found: dict[int, list[TicketRow]] = {}
    for row in rows("test"):
        if row.pair is not None:
            found.setdefault(row.pair, []).append(row)
    return found


def test_there_are_enough_rows_and_each_text_occurs_once():
    """Mutation: lower TRAIN_ROWS below 6,000, or append rows without looking for duplicates."""
    assert len(rows("train")) >= 6000
    assert len(rows("test")) >= 2000
    prompts = [row.prompt for split in ("train", "test") for row in rows(split)]
    assert len(set(prompts)) == len(prompts)


def test_every_queue_is_used_and_depends_on_family_and_kind_alone():
    """Mutation: shuffle the house table anew for each split."""
    table: dict[tuple[str, str], str] = {}
    for split in ("train", "test"):
        for row in rows(split):
            assert table.setdefault((row.family, row.kind), row.queue) == row.queue
    assert sorted(table.values()) == sorted(QUEUES)
    assert len(set(QUEUES)) == 48


def test_no_template_filling_is_in_both_splits():
    """Mutation: draw the second mention from any split."""
    train = {filling for row in rows("train") for filling in row.fillings}
    test = {filling for row in rows("test") for filling in row.fillings}
    assert len(train) > 3000
    assert len(test) > 1000
    assert not train & test


def test_pretraining_tickets_use_training_fillings_only():
    """Mutation: let `draw_documents` draw from the test split."""
    from_tickets = [
        tickets.draw_ticket(random.Random(seed), "train", second_share=0.75) for seed in range(500)
    ]
    test = {filling for row in rows("test") for filling in row.fillings}
    assert not test & {filling for ticket in from_tickets for filling in ticket.fillings}


@pytest.mark.parametrize("split", ["train", "test"])
def test_at_least_35_percent_have_a_second_mention_of_each_state(split):
    """Mutation: drop one state from the frames, or lower the share to 0.3."""
    states = Counter(row.second for row in rows(split))
    assert set(states) == {None, "resolved", "negated", "quoted"}
    assert states[None] <= 0.65 * len(rows(split))


def test_pairs_are_permutations_of_the_same_words_with_other_queues():
    """Mutation: draw the frames of the two members apart, or add typos to one of them."""
    assert len(pairs()) >= 200
    for one, two in pairs().values():
        assert Counter(words(one.prompt)) == Counter(words(two.prompt))
        assert one.queue != two.queue
        assert one.prompt != two.prompt


def test_queue_names_share_no_word_with_any_ticket():
    """Mutation: name a queue after a word of a distractor, as `box`."""
    used = {
        word for split in ("train", "test") for row in rows(split) for word in words(row.prompt)
    }
    literal = " ".join((*DISTRACTORS, *FAMILIES, *(" ".join(c) for c in CLAUSES.values())))
    assert not set(QUEUES) & (used | set(words(literal)))


def test_each_kind_has_30_paraphrases_and_there_are_about_40_products():
    """Mutation: repeat a paraphrase."""
    everything = [template for templates in CLAUSES.values() for template in templates]
    assert len(set(everything)) == len(everything)
    assert min(map(len, CLAUSES.values())) >= 30
    assert all(template.count("{p}") == 1 for template in everything)
    assert len(tickets.PRODUCTS) == 40


def test_frames_name_their_clauses_once():
    """Mutation: a joint frame that leaves out its second clause."""
    for frames in JOINT_FRAMES.values():
        assert all(len(re.findall(r"\{[abA]\}", frame)) == 2 for frame in frames)
    for frames in SECOND_FRAMES.values():
        assert all(len(re.findall(r"\{[cp]\}", frame)) == 1 for frame in frames)


def test_typos_change_one_or_two_words_and_no_product():
    """Mutation: misspell capitalized words too."""
    text = "The handle of the Zorvik came off since Monday."
    for seed in range(50):
        changed = tickets.add_typos(random.Random(seed), text).split(" ")
        differences = [i for i, word in enumerate(text.split(" ")) if word != changed[i]]
        assert len(differences) <= 2
        assert "Zorvik" in changed


def test_rows_are_the_same_in_every_call_and_match_a_fresh_draw():
    """Mutation: seed the generator from the clock or from `hash(str)`."""
    before = rows("test")
    tickets.task_rows.cache_clear()
    assert rows("test") == before
    assert before[0].messages[0]["content"] == before[0].prompt
    assert before[0].messages[1]["content"] == before[0].queue
