"""The page on which people review: its calls, and the Gradio app that serves them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from utils.data.left_out import ACCEPT
from utils.review.real_photos import BlindTest, RealPhotos
from utils.review.set_images import THUMBNAIL_SIZE, SetImages, Thumbnails, draw_thumbnail
from utils.review.summary import summarise_review
from utils.review.verdicts import Review

HERE = Path(__file__).parent
FULL_SIZE = 1024  # pixels of the enlarged image


@dataclass(frozen=True)
class ReviewPage:
    """What the page asks for; every call takes and returns what JSON holds.

    `shown` has the numbers of the images to review in their order, by label; `scores` are `(n,)`.
    """

    images: SetImages
    thumbnails: Thumbnails
    review: Review
    reviewer: str
    shown: Mapping[int, np.ndarray]
    page_size: int
    is_sample: bool = False
    score_name: str | None = None
    scores: np.ndarray | None = None
    photos: RealPhotos | None = None
    blind: BlindTest | None = None

    def overview(self, _: object = None) -> dict:
        """Return the classes with their progress, and what the page needs to know once."""
        self.review.reload()
        return {
            "reviewer": self.reviewer, "page_size": self.page_size, "score_name": self.score_name,
            "is_sample": self.is_sample, "classes": [self._progress(label) for label in self.shown],
            "num_questions": len(self.blind.questions) if self.blind else 0,
        }  # fmt: skip

    def open_page(self, asked: dict) -> dict:
        """Return a page of a class: images with verdicts and scores; real images if asked for.

        Without `page` it is the first with an image that the reviewer has not judged.
        """
        label = int(asked["label"])
        numbers = self.shown[label].tolist()
        if (page := asked.get("page")) is None:
            page = next((place for place, number in enumerate(numbers) if self._verdict(number) is None), 0)
            page //= self.page_size
        some = numbers[page * self.page_size : (page + 1) * self.page_size]
        found = {
            "label": label, "page": page, "num_pages": -(-len(numbers) // self.page_size),
            "images": [
                {
                    "number": number, "picture": picture, "verdict": self._verdict(number),
                    "title": f"{self.images.class_names[label]} {self.images.class_indices[number]}",
                    "score": None if self.scores is None or np.isnan(self.scores[number]) else
                    round(float(self.scores[number]), 3),
                }
                for number, picture in zip(some, self.thumbnails.get(some))
            ],
        }  # fmt: skip
        if asked.get("with_real"):
            found["real"] = [] if self.photos is None else self.photos.thumbnails(label, THUMBNAIL_SIZE)
        return found

    def enlarge(self, asked: dict) -> str | None:
        """Return an image of the set in full, at most `FULL_SIZE` pixels wide and high."""
        number = self._check(asked["number"])
        return draw_thumbnail(dict(self.images.read_encoded([number]))[number], FULL_SIZE)

    def give(self, asked: dict) -> dict:
        """Save a verdict on images of one class; return the class's progress."""
        numbers = [self._check(number) for number in asked["numbers"]]
        self.review.give([self.images.key(number) for number in numbers], asked["verdict"], self.reviewer)
        return self._progress(int(self.images.labels[numbers[0]]))

    def undo(self, _: object = None) -> dict | None:
        """Take back the last call of `give`; return its class's progress and one of its images, None without one."""
        keys = self.review.undo(self.reviewer)
        if not keys:
            return None
        label = self.images.class_names.index(keys[0][0])
        numbers = self.images.numbers_by_class[label]
        number = int(numbers[self.images.class_indices[numbers] == keys[0][1]][0])
        page = self.shown[label].tolist().index(number) // self.page_size
        return {"progress": self._progress(label), "number": number, "page": page}

    def ask(self, _: object = None) -> dict:
        """Return the first question of the blind mode that the reviewer has not answered, with its image."""
        answered = self.review.blind.get(self.reviewer, {})
        open_ones = [
            place for place, asked in enumerate(self.blind.questions) if self.blind.image_name(asked) not in answered
        ]
        found = {"num_answered": len(self.blind.questions) - len(open_ones), "class_names": self._asked_classes()}
        if open_ones:
            found |= {"place": open_ones[0], "picture": self.blind.picture(self.blind.questions[open_ones[0]])}
        return found

    def answer(self, asked: dict) -> dict:
        """Save an answer of the blind mode; return the next question."""
        question = self.blind.questions[int(asked["place"])]
        if asked["said_class"] not in self.images.class_names:
            raise ValueError(f"unknown class {asked['said_class']!r}")
        said = {
            "class": self.images.class_names[question.label], "is_real": question.part is not None,
            "said_class": asked["said_class"], "said_real": bool(asked["said_real"]),
        }  # fmt: skip
        self.review.answer(self.blind.image_name(question), said, self.reviewer)
        return self.ask()

    def summarise(self, _: object = None) -> dict:
        """Return the summary of all reviewers: heads and rows of a table, and lines of text."""
        self.review.reload()
        table = summarise_review(self.review, self.images, self.shown, self.is_sample)
        return dict(zip(("heads", "rows", "lines"), table))

    def _asked_classes(self) -> list[str]:
        labels = sorted({question.label for question in self.blind.questions})
        return [self.images.class_names[label] for label in labels]

    def _verdict(self, number: int) -> str | None:
        return self.review.verdict(self.images.key(number), self.reviewer)

    def _check(self, number: object) -> int:
        if not 0 <= int(number) < len(self.images):
            raise ValueError(f"no image {number}")
        return int(number)

    def _progress(self, label: int) -> dict:
        name, own = self.images.class_names[label], []
        of_class = self.review.verdicts.get(name, {})
        for index in self.images.class_indices[self.shown[label]].tolist():
            given = of_class.get(str(index), {}).get(self.reviewer)
            own += [given["verdict"]] if given else []
        return {
            "label": label, "name": name, "num_images": len(self.shown[label]), "num_reviewed": len(own),
            "num_accepted": own.count(ACCEPT),
        }  # fmt: skip


def start_page(
    page: ReviewPage, host: str, port: int | None, share: bool, login: tuple[str, str] | None
) -> tuple[list[str], Callable[[], None]]:
    """Serve the page from a thread of its own; return its addresses, and what ends it.

    Nothing on the disk can be asked for, and nothing can be uploaded.

    Raises:
        OSError: the port is taken.
    """
    import gradio as gr

    calls = [page.overview, page.open_page, page.enlarge, page.give, page.undo, page.ask, page.answer, page.summarise]
    with gr.Blocks(title="Review of synthetic images", analytics_enabled=False) as app:
        gr.HTML(
            html_template=(HERE / "page.html").read_text(encoding="utf-8"),
            css_template=(HERE / "page.css").read_text(encoding="utf-8"),
            js_on_load=(HERE / "page.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            server_functions=[_plain_function(call) for call in calls],
        )
    _, local, public = app.launch(
        server_name=host, server_port=port, share=share, auth=login, prevent_thread_lock=True, quiet=True,
        inbrowser=False, footer_links=[], blocked_paths=[HERE.anchor], max_file_size=1, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, run_history=False,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )  # fmt: skip
    return [address for address in (local, public) if address], partial(app.close, verbose=False)


def _plain_function(method: Callable) -> Callable:
    """Return a function that Gradio can mark as callable from the page, which it cannot a bound method."""

    def call(asked=None):
        return method(asked)

    call.__name__ = method.__name__
    return call
