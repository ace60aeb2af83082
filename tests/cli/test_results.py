"""An object counts as still found when the same kind is in the same place, each object once."""

import pytest

from cli.demo.results import Found, match, overlap

CUP, CAT = 47, 17


def found(category_id: int, *box: float) -> Found:
    return Found((box[0], box[1], box[2], box[3]), 0.9, category_id, str(category_id))


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((3, 3, 3, 9), (3, 3, 3, 9), 0.0),
    ],
)
def test_overlap_is_intersection_over_union(one: tuple, two: tuple, expected: float) -> None:
    assert overlap(one, two) == pytest.approx(expected)


def test_another_kind_in_the_same_place_is_no_match() -> None:
    assert match([found(CUP, 0, 0, 10, 10)], [found(CAT, 0, 0, 10, 10)]) == [None]


def test_two_objects_never_share_a_match_and_the_closer_one_wins() -> None:
    before = [found(CUP, 0, 0, 10, 8), found(CUP, 0, 0, 10, 10)]
    assert match(before, [found(CUP, 0, 0, 10, 10)]) == [None, 0]
    assert match(before, [found(CUP, 0, 0, 10, 10), found(CUP, 0, 0, 10, 7)]) == [1, 0]


def test_far_away_is_lost() -> None:
    assert match([found(CUP, 0, 0, 10, 10)], [found(CUP, 6, 6, 16, 16)]) == [None]
    assert match([], [found(CUP, 6, 6, 16, 16)]) == []
