"""Which frames are sent alone, and which are given up."""

from edge.suspects import ALONE_LOSSES, Suspects


def test_a_frame_is_sent_alone_after_so_many_losses_and_given_up_after_those_it_suffered_alone() -> None:
    suspects = Suspects(after=2)
    assert suspects.lost("unavailable", [(1, True), (2, True), (3, False)]) == []
    assert not suspects.is_suspect(1)
    assert suspects.lost("unavailable", [(1, True), (2, True)]) == []
    assert [suspects.is_suspect(frame_id) for frame_id in (1, 2, 3)] == [True, True, False]
    suspects.forget(2)  # it passed, alone
    for _ in range(ALONE_LOSSES - 1):
        assert suspects.lost("unavailable", [(1, True)]) == []
        assert not suspects.is_given_up(1)
    assert suspects.lost("unavailable", [(1, True)]) == [1]
    assert suspects.is_given_up(1)
    assert suspects.lost("unavailable", [(1, True)]) == [], "said once"
    suspects.forget(1)
    assert (suspects.is_given_up(1), len(suspects)) == (False, 0)


def test_a_loss_in_company_does_not_condemn_a_suspect() -> None:
    suspects = Suspects(after=1)
    for _ in range(20):
        assert suspects.lost("unavailable", [(1, True), (2, True)]) == []
    assert suspects.is_suspect(1)
    assert not suspects.is_given_up(1)


def test_a_line_a_silent_cloud_and_a_drain_blame_no_frame() -> None:
    suspects = Suspects(after=1)
    ends = {"unavailable": False, "cancelled": False, "stalled": True, "ok": True, "permission_denied": True}
    for end, received in ends.items():
        for _ in range(20):
            assert suspects.lost(end, [(1, received)]) == []
    assert not suspects.is_suspect(1)


def test_an_error_about_what_was_sent_needs_no_receipt() -> None:
    suspects = Suspects(after=1)
    suspects.lost("invalid_argument", [(1, False)])
    assert suspects.is_suspect(1)


def test_nothing_is_suspected_where_that_is_switched_off() -> None:
    suspects = Suspects(after=0)
    for _ in range(20):
        assert suspects.lost("unknown", [(1, True)]) == []
    assert not suspects.is_suspect(1)
