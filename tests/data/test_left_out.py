"""What a synthetic set's verdicts leave out."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from utils.cli.errors import UserError
from utils.cli.records import write_record
from utils.data.left_out import REVIEW, SCORES, SCORES_KEY, LeftOut, read_left_out
from utils.hub.repositories import Source

FINGERPRINT = "f" * 64


def vote(**verdicts: str) -> dict:
    return {reviewer: {"verdict": verdict, "time": "2026-11-28T12:00:00"} for reviewer, verdict in verdicts.items()}


@pytest.fixture
def source(tmp_path) -> Source:
    return Source(str(tmp_path), "--synthetic_dataset", "dataset")


def write_scores(folder, fingerprint: str = FINGERPRINT) -> None:
    table = pa.table({"class": ["cat", "dog", "cat"], "class_index": [7, 0, 2], "left_out": [True, True, False]})
    metadata = {SCORES_KEY: json.dumps({"fingerprint": fingerprint})}
    pq.write_table(table.replace_schema_metadata(metadata), f"{folder}/{SCORES}")


def test_a_set_without_verdicts_leaves_nothing_out(source):
    left_out = read_left_out(source, None)
    assert not left_out and len(left_out) == 0 and left_out.counts() == {}


def test_images_are_left_out_by_most_reviewers_and_by_scores(source):
    verdicts = {
        "cat": {"2": vote(ada="reject"), "3": vote(ada="reject", ben="accept"), "4": vote(ada="accept")},
        "dog": {"0": vote(ada="reject", ben="accept", cy="reject")},
    }
    write_record(f"{source.name}/{REVIEW}", {"fingerprint": FINGERPRINT, "verdicts": verdicts})
    write_scores(source.name)
    left_out = read_left_out(source, FINGERPRINT)
    assert left_out.rejected == {("cat", 2), ("dog", 0)} and left_out.filtered == {("cat", 7), ("dog", 0)}
    assert len(left_out) == 3 and left_out.counts() == {"num_rejected": 2, "num_filtered": 2}
    line = left_out.describe("cars-syn")
    assert (
        "3 images are left out (2 rejected in review.json, 2 by their scores in scores.parquet, 1 of them both)" in line
    )
    labels, indices = np.array([0, 1, 1, 1, 2]), np.array([0, 2, 7, 8, 2])
    assert left_out.mask(["dog", "cat", "owl"], labels, indices).tolist() == [True, True, True, False, False]
    assert left_out.identity != LeftOut(left_out.rejected).identity == LeftOut(filtered=left_out.rejected).identity


@pytest.mark.parametrize("fingerprint", ["0" * 64, None])
@pytest.mark.parametrize("filename", [REVIEW, SCORES])
def test_verdicts_about_other_images_are_one_line(source, filename, fingerprint):
    if filename == SCORES:
        write_scores(source.name)
    else:
        write_record(f"{source.name}/{REVIEW}", {"fingerprint": FINGERPRINT, "verdicts": {}})
    assert not read_left_out(source, FINGERPRINT).rejected
    with pytest.raises(UserError, match=f"{filename} is about other images"):
        read_left_out(source, fingerprint)


def test_scores_that_cannot_be_read_are_one_line(source):
    Path(source.name, SCORES).write_bytes(b"torn")
    with pytest.raises(UserError, match="scores.parquet cannot be read .*; run filter_synthetic.py again"):
        read_left_out(source, FINGERPRINT)
