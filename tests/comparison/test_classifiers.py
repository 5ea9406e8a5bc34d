"""The classifiers of a comparison: short labels that tell them apart, and revisions."""

import pytest

from utils.cli.errors import UserError
from utils.comparison.classifiers import parse_classifiers


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["timm/resnet18.tv_in1k", "google/vit"], ["resnet18.tv_in1k", "vit"]),
        (["runs/a/model/", "runs/b", "other"], ["model", "b", "other"]),
        (["timm/resnet18", "me/resnet18", "google/vit"], ["timm/resnet18", "me/resnet18", "vit"]),
        (["me/vit@v1", "me/vit@refs/pr/2", "me/vit"], ["vit@v1", "vit@refs/pr/2", "vit"]),
        (["me/vit@v1", "you/vit@v1"], ["me/vit@v1", "you/vit@v1"]),
        (["."], ["."]),
    ],
)
def test_labels_are_the_last_part_of_the_name_unless_two_have_the_same(values, labels):
    assert [classifier.label for classifier in parse_classifiers(values)] == labels
    assert [classifier.given for classifier in parse_classifiers(values)] == values


def test_each_classifier_has_its_own_revision_and_folders_have_none(tmp_path):
    (tmp_path / "a@b").mkdir()
    parsed = parse_classifiers(["me/vit@refs/pr/2", "me/vit", str(tmp_path / "a@b")])
    assert [(classifier.name, classifier.revision) for classifier in parsed] == [
        ("me/vit", "refs/pr/2"), ("me/vit", None), (str(tmp_path / "a@b"), None),
    ]  # fmt: skip
    assert parse_classifiers(["me/vit"], "v1")[0].revision == "v1"
    with pytest.raises(UserError, match="^--model_revision v1: me/vit@v2 names a revision too; leave one of them out"):
        parse_classifiers(["me/vit@v2"], "v1")
