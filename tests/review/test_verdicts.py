"""review.json: verdicts are on disk at once, survive other writers and failures, and training reads them."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.review.builders import FINGERPRINT
from utils.cli.errors import UserError
from utils.data.left_out import read_left_out
from utils.hub.repositories import Source
from utils.review import verdicts
from utils.review.verdicts import Review

CAR, VAN = ("car", 3), ('a "van"', 12)


def left_out(folder):
    return read_left_out(Source(str(folder), "--synthetic_dataset", "dataset"), FINGERPRINT)


def test_a_verdict_is_on_disk_at_once_and_training_leaves_the_image_out(tmp_path):
    review = Review(tmp_path, FINGERPRINT)
    review.give([CAR, VAN], "reject", "anna")
    review.give([VAN], "accept", "anna")
    record = json.loads((tmp_path / "review.json").read_text())
    assert (record["schema_version"], record["fingerprint"]) == (1, FINGERPRINT)
    assert record["verdicts"]["car"]["3"]["anna"]["verdict"] == "reject"
    assert record["verdicts"]["car"]["3"]["anna"]["time"].endswith("+00:00")
    assert left_out(tmp_path).rejected == {CAR}


def test_another_process_reads_what_was_given(tmp_path):
    Review(tmp_path, FINGERPRINT).give([CAR], "accept", "anna")
    assert Review(tmp_path, FINGERPRINT).verdict(CAR, "anna") == "accept"
    assert Review(tmp_path, FINGERPRINT).verdict(CAR, "ben") is None


def test_undo_restores_what_was_said_before_call_by_call(tmp_path):
    review = Review(tmp_path, FINGERPRINT)
    review.give([CAR], "reject", "anna")
    review.give([CAR, VAN], "accept", "anna")
    assert set(review.undo("anna")) == {CAR, VAN}
    assert (review.verdict(CAR, "anna"), review.verdict(VAN, "anna")) == ("reject", None)
    assert review.undo("anna") == [CAR]
    assert review.undo("anna") == []
    assert json.loads((tmp_path / "review.json").read_text())["verdicts"] == {}


def test_two_writers_keep_each_others_verdicts(tmp_path):
    anna, ben = Review(tmp_path, FINGERPRINT), Review(tmp_path, FINGERPRINT)

    def give(review_and_name):
        review, name = review_and_name
        for index in range(30):
            review.give([("car", index)], "reject" if index % 2 else "accept", name)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(give, [(anna, "anna"), (ben, "ben")]))
    found = Review(tmp_path, FINGERPRINT).verdicts["car"]
    assert {(index, name) for index, given in found.items() for name in given} == {
        (str(index), name) for index in range(30) for name in ("anna", "ben")
    }


def test_a_verdict_that_cannot_be_written_is_not_kept(tmp_path, monkeypatch):
    review = Review(tmp_path, FINGERPRINT)
    review.give([CAR], "accept", "anna")

    def fail(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "write_text", fail)
        with pytest.raises(OSError):
            review.give([CAR, VAN], "reject", "anna")
    assert (review.verdict(CAR, "anna"), review.verdict(VAN, "anna")) == ("accept", None)
    review.give([VAN], "reject", "anna")
    assert left_out(tmp_path).rejected == {VAN}


def test_answers_of_the_blind_test_leave_verdicts_alone(tmp_path):
    review = Review(tmp_path, FINGERPRINT)
    review.give([CAR], "reject", "anna")
    review.answer("synthetic car 3", {"class": "car", "said_class": "van"}, "anna")
    again = Review(tmp_path, FINGERPRINT)
    assert again.blind["anna"]["synthetic car 3"]["said_class"] == "van"
    assert left_out(tmp_path).rejected == {CAR}


def test_verdicts_on_other_images_are_refused(tmp_path):
    Review(tmp_path, "other").give([CAR], "reject", "anna")
    with pytest.raises(UserError, match="is about other images"):
        Review(tmp_path, FINGERPRINT)


def test_an_unknown_verdict_changes_nothing(tmp_path):
    review = Review(tmp_path, FINGERPRINT)
    with pytest.raises(ValueError, match="unknown verdict"):
        review.give([CAR], "maybe", "anna")
    assert not (tmp_path / "review.json").exists()
