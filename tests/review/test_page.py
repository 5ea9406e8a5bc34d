"""What the page asks for, without a browser and without Gradio."""

import base64
import io
import json

import pytest
from PIL import Image

from tests.review.builders import CLASS_NAMES, FINGERPRINT, save_set
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images
from utils.review.page import ReviewPage
from utils.review.real_photos import BlindTest, RealPhotos
from utils.review.set_images import Thumbnails, choose_shown, open_set_images
from utils.review.verdicts import Review


def make_page(folder, real_dir=None, reviewer="anna", num_per_class=None, page_size=4) -> ReviewPage:
    images = open_set_images(folder)
    photos = blind = None
    if real_dir is not None:
        real = load_real_images(RealImagesRecord(dataset_name=str(real_dir), num_shots=2))
        photos = RealPhotos.match(real, CLASS_NAMES)
        blind = BlindTest.draw(images, photos, 0)
    return ReviewPage(
        images, Thumbnails(images), Review(folder, FINGERPRINT), reviewer, choose_shown(images, None, num_per_class, 0),
        page_size, photos=photos, blind=blind,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return save_set(tmp_path / "syn")


def test_a_page_has_images_with_verdicts_and_the_class_opens_where_review_stopped(folder):
    page = make_page(folder)
    first = page.open_page({"label": 1})
    assert (first["page"], first["num_pages"]) == (0, 3)
    assert [image["title"] for image in first["images"]] == [f"green circle {index}" for index in range(4)]
    numbers = [image["number"] for image in first["images"]]
    progress = page.give({"numbers": numbers[:3], "verdict": "accept"})
    assert (progress["name"], progress["num_reviewed"], progress["num_images"]) == ("green circle", 3, 10)
    page.give({"numbers": numbers[3:], "verdict": "reject"})
    again = make_page(folder)  # a new start
    assert again.open_page({"label": 1})["page"] == 1
    said = [image["verdict"] for image in again.open_page({"label": 1, "page": 0})["images"]]
    assert said == ["accept", "accept", "accept", "reject"]
    assert [one["num_reviewed"] for one in again.overview()["classes"]] == [0, 4, 0]
    assert make_page(folder, reviewer="ben").open_page({"label": 1})["page"] == 0


def test_undo_says_where_the_image_is(folder):
    page = make_page(folder)
    number = page.open_page({"label": 2, "page": 2})["images"][1]["number"]
    page.give({"numbers": [number], "verdict": "reject"})
    undone = page.undo()
    assert (undone["number"], undone["page"], undone["progress"]["num_reviewed"]) == (number, 2, 0)
    assert page.undo() is None


@pytest.mark.parametrize("number", [-1, 30, "x"])
def test_an_image_that_is_not_in_the_set_is_refused_and_nothing_saved(folder, number):
    page = make_page(folder)
    with pytest.raises(ValueError):
        page.give({"numbers": [0, number], "verdict": "reject"})
    assert not (folder / "review.json").exists()


def test_real_images_of_the_class_are_shown(folder, real_images_dir):
    page = make_page(folder, real_images_dir)
    assert len(page.open_page({"label": 0, "with_real": True})["real"]) == 2  # shots
    assert "real" not in page.open_page({"label": 0})
    assert make_page(folder).open_page({"label": 0, "with_real": True})["real"] == []


def test_a_question_of_the_blind_test_does_not_tell_its_answer(folder, real_images_dir):
    page = make_page(folder, real_images_dir)
    questions = page.blind.questions
    assert sum(question.part is None for question in questions) == len(questions) / 2 == 15
    assert {question.part for question in questions} == {None, "test"}
    asked = page.ask()
    assert set(asked) == {"num_answered", "class_names", "place", "picture"}
    pictures = [page.blind.picture(question) for question in questions]
    opened = [Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) for picture in pictures]
    assert {(image.size, image.format, image.mode) for image in opened} == {((32, 32), "JPEG", "RGB")}


def test_answers_of_the_blind_test_are_saved_and_resumed(folder, real_images_dir):
    page = make_page(folder, real_images_dir)
    asked = page.ask()
    following = page.answer({"place": asked["place"], "said_class": CLASS_NAMES[0], "said_real": True})
    assert following["num_answered"] == 1 and following["place"] != asked["place"]
    question = page.blind.questions[asked["place"]]
    [saved] = json.loads((folder / "review.json").read_text())["blind"]["anna"].values()
    assert saved.pop("time")
    assert saved == {
        "class": CLASS_NAMES[question.label], "is_real": question.part is not None, "said_class": CLASS_NAMES[0],
        "said_real": True,
    }  # fmt: skip
    assert make_page(folder, real_images_dir).ask()["num_answered"] == 1
    with pytest.raises(ValueError, match="unknown class"):
        page.answer({"place": 1, "said_class": "no such", "said_real": True})
    for _ in page.blind.questions[1:]:
        following = page.answer({"place": following["place"], "said_class": CLASS_NAMES[0], "said_real": True})
    assert set(following) == {"num_answered", "class_names"}
    assert "Blind test: class recognised on real images 33%" in page.summarise()["lines"][-1]
