"""A card says what the encoder predicts, how well, and from what it was made; its code is right for its subjects."""

from dataclasses import replace

import pytest
import yaml

from featcache.dataset.algonauts import open_challenge
from heads.encoder.card import Card, Score, card_text
from heads.encoder.work import encoder_of_work


@pytest.fixture(scope="module")
def card(every_kind, tiny):
    subjects = open_challenge(tiny).subjects
    return Card(
        parts=encoder_of_work(subjects, every_kind)._parts,
        data="a tree of a test",
        scores=[Score("subj01", "V1v", "blend", 1234, 0.4321, 0.4, 0.5), Score("subj02", "all", "blend", 7, 0.25)],
        measure="Mean Pearson r",
        versions={"torch": "9.9"},
        n_images={"subj01": 1600},
    )


def test_a_card_has_the_header_that_hubs_read(card):
    header = card_text(card).split("---\n")[1]
    assert yaml.safe_load(header)["library_name"] == "featcache"


def test_a_card_names_everything_that_the_encoder_is_made_of(card):
    text = card_text(card)
    for name, part in card.parts.subjects.items():
        assert f"| {name} | " in text and all(f"`{model}`" in text for model in part.models)
        assert all(f"{surface} ({n:,})" in text for surface, n in part.n_vertices.items())
    for part in card.parts.features.values():
        height, width = part.key.transform["input_size"][1:]
        assert f"- `{part.network}` at {height}x{width} pixels" in text
    assert "after finetune without fold 1 of 2" in text and "torch 9.9" in text and "a tree of a test" in text
    assert "| 1,600 |" in text and "Mean Pearson r" in text


def test_scores_have_intervals_where_they_are_known(card):
    text = card_text(card)
    assert "| subj01 | V1v | blend | 1,234 | 0.432 (0.400 to 0.500) |" in text
    assert "| subj02 | all | blend | 7 | 0.250 |" in text
    assert "None are known" in card_text(replace(card, scores=())) and "None are known" not in text


def test_the_code_of_a_card_names_a_subject_where_it_has_to(card):
    both = card_text(card)
    first = {"subj01": card.parts.subjects["subj01"]}
    alone = card_text(replace(card, parts=replace(card.parts, subjects=first)))
    assert 'subject="subj01"' in both and "subject=" not in alone
    without = replace(first["subj01"], rois={})
    assert "roi=" in alone
    assert "roi=" not in card_text(replace(card, parts=replace(card.parts, subjects={"subj01": without})))
