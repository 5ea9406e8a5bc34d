"""A few real images per class: those shown beside the synthetic ones, and others for the blind mode."""

import io
from dataclasses import dataclass, replace

import numpy as np
from datasets import Image
from PIL import Image as PILImage

from utils.data.class_names import match_labels
from utils.data.image_set import RealImages
from utils.review.set_images import SetImages, draw_square, draw_thumbnail

NUM_SHOWN = 8  # per class, beside the synthetic images
NUM_ASKED = 5  # per class and kind, in the blind mode
BLIND_SIZE = 160  # pixels at most


@dataclass(frozen=True)
class RealPhotos:
    """The real images of a set's record; `places` maps a label of the synthetic set to the real set's."""

    real: RealImages
    places: dict[int, int]

    @classmethod
    def match(cls, real: RealImages, class_names: list[str]) -> "RealPhotos":
        """Match the classes of a synthetic set with the real ones by name.

        Raises:
            UserError: a class is not in the real set.
        """
        found = match_labels(class_names, real.class_names, f"{real.record.name}:", "the synthetic set", True)
        return cls(real, dict(enumerate(found.values())))

    def rows(self, part: str, label: int, limit: int, seed: int = 0) -> np.ndarray:
        """Return up to `limit` rows of a part's images with the synthetic set's `label`, drawn by `seed`."""
        rows = np.flatnonzero(np.asarray(getattr(self.real, part)["label"]) == self.places[label])
        return np.sort(np.random.default_rng([seed, label]).permutation(rows)[:limit])

    def encoded(self, part: str, row: int) -> bytes:
        image = getattr(self.real, part).cast_column("image", Image(decode=False))[int(row)]["image"]
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()

    def thumbnails(self, label: int, size: int) -> list[str | None]:
        """Return pictures of training images of a class, as data URLs."""
        return [draw_thumbnail(self.encoded("train", row), size) for row in self.rows("train", label, NUM_SHOWN)]


@dataclass(frozen=True)
class Question:
    """An image of the blind mode: of the synthetic set (`part` is None) by number, or of a part of the real by row."""

    label: int
    part: str | None
    number: int


@dataclass(frozen=True)
class BlindTest:
    """Real and synthetic images of the same classes, mixed. A reviewer is asked for the class, and whether it is real.

    All pictures are squares of `side` pixels, so that neither kind shows more detail.
    """

    images: SetImages
    photos: RealPhotos
    questions: list[Question]
    side: int

    @classmethod
    def draw(cls, images: SetImages, photos: RealPhotos, seed: int) -> "BlindTest | None":
        """Draw as many real as synthetic images per class; None where no class has real images.

        Held-out real images come first: the training images are shown beside the synthetic ones.
        """
        questions = []
        for label, numbers in images.numbers_by_class.items():
            real = [
                Question(label, part, int(row))
                for part in ("test", "validation", "train")
                for row in photos.rows(part, label, NUM_ASKED, seed)
            ][:NUM_ASKED]
            drawn = np.random.default_rng([seed, label]).permutation(numbers)[: len(real)]
            questions += [*real, *(Question(label, None, int(number)) for number in drawn)]
        if not questions:
            return None
        order = np.random.default_rng(seed).permutation(len(questions))
        test = cls(images, photos, [questions[place] for place in order], BLIND_SIZE)
        kinds = {question.part is None: question for question in questions}
        sizes = [PILImage.open(io.BytesIO(test._encoded(question))).size for question in kinds.values()]
        return replace(test, side=min(BLIND_SIZE, *np.ravel(sizes).tolist()))

    def image_name(self, question: Question) -> str:
        """Return what tells the image from others in review.json."""
        if question.part is not None:
            return f"real {question.part} {question.number}"
        return "synthetic {} {}".format(*self.images.key(question.number))

    def picture(self, question: Question) -> str:
        """Return a question's image as a data URL."""
        return draw_square(PILImage.open(io.BytesIO(self._encoded(question))), self.side)

    def _encoded(self, question: Question) -> bytes:
        if question.part is not None:
            return self.photos.encoded(question.part, question.number)
        return dict(self.images.read_encoded([question.number]))[question.number]
