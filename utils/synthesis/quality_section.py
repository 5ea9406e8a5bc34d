"""The section of a synthetic set's card that holds its quality report."""

from utils.hub.cards import code, text

MAX_CLASSES = 10
MARKS = {"good": "good", "look": "**look**", "bad": "**bad**", "unknown": "not known"}


def quality_section(record: dict | None) -> str:
    """Return the Markdown for the record in `quality.json`, '' when there is none.

    `quality.png` is linked as a file beside the card, `duplicates.png` is not: it shows real images.
    """
    if not record:
        return ""
    model, counts = record["model"], record["num_images"]
    revision = f" (commit {code(model['revision'])})" if model["revision"] else ""
    parts = [
        "## Quality",
        f"{counts['synthetic']['used']:,} synthetic images beside {counts['train']['used']:,} real training, "
        f"{counts['held_out']['used']:,} held-out and {counts['test']['used']:,} test images, in the features of "
        f"{code(model['id'])}{revision}. The floor is what held-out real images reach in place of synthetic ones.",
        _verdict_table(record["verdicts"]),
        _distance_table(record["distance"]),
        _class_table(record["classes"]),
        "![distances, classes, diversity and similarities](quality.png)",
        "`duplicates.png` has the pairs that are most alike; it shows real images, so it is not published.",
        "What these figures cannot tell:\n\n" + "\n".join(f"- {text(caveat)}" for caveat in record["caveats"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdict_table(verdicts: list[dict]) -> str:
    rows = [f"| {text(entry['subject'])} | {MARKS[entry['level']]} | {text(entry['text'])} |" for entry in verdicts]
    return "\n".join(["| what | verdict | why |", "|---|---|---|", *rows])


def _distance_table(distance: dict) -> str:
    if distance["frechet"]["floor"] is None:
        return ""
    rows = [
        f"| {name} distance | {distance[key]['synthetic']:.4g} | {distance[key]['floor']:.4g} |"
        for name, key in (("Frechet", "frechet"), ("kernel", "kernel"))
    ]
    header = f"| to {distance['num_train']:,} real training images | {distance['num_images']:,} synthetic | floor |"
    return "\n".join([header, "|---|---|---|", *rows])


def _class_table(classes: list[dict]) -> str:
    """Return the figures of the classes that are farthest from their real ones."""
    rows = [
        f"| {text(entry['class'])} | {_beside(entry['shift'], entry['shift_floor'], '.2f')} | "
        f"{_beside(entry['diversity'], entry['real_diversity'], '.2f')} | "
        f"{_beside(entry['own_share'], entry['real_own_share'], '.0%')} |"
        for entry in classes[:MAX_CLASSES]
    ]
    intro = "Farthest classes first" + (f", {MAX_CLASSES} of {len(classes)}" if len(classes) > MAX_CLASSES else "")
    return "\n".join(
        [
            f"{intro}; real images in brackets. Shift: 0 is as real, 1 as far off as the nearest other class.",
            "",
            "| class | shift | diversity | nearest to own class |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _beside(value: float | None, real: float | None, form: str) -> str:
    texts = ["-" if number is None else format(number, form) for number in (value, real)]
    return f"{texts[0]} ({texts[1]})"
