"""The figures of a quality report in words: verdicts, and what the figures cannot tell."""

import math

GOOD, LOOK, BAD, UNKNOWN = "good", "look", "bad", "unknown"

# multiples of the floor from which a distance is more than chance, and obvious
NOTABLE_RATIO, LARGE_RATIO = 2.0, 10.0
NOTABLE_SHIFT, LARGE_SHIFT = 0.5, 1.0  # in distances to the nearest other class
NOTABLE_LOSS, LARGE_LOSS = 0.1, 0.3  # share of images nearest to another class, beyond that of real images
NOTABLE_DIVERSITY, SMALL_DIVERSITY, LARGE_DIVERSITY = 0.8, 0.5, 1.25  # times that of the real images
EXPECTED_SHARE = 0.01  # of independent real images lies above the threshold of look-alikes
FEW_IMAGES = 500


def judge(record: dict) -> list[dict]:
    """Return the verdicts on a report's record: dicts of `subject`, `level` and `text`."""
    findings = {
        "whole set": _judge_distance(record),
        "classes": _judge_shifts(record["classes"]),
        "labels": _judge_labels(record["nearest_class"]),
        "diversity": _judge_diversity(record["classes"], record["diversity"]),
        "copies of test images": _judge_duplicates(record["duplicates"].get("test"), "test"),
        "copies of training images": _judge_duplicates(record["duplicates"].get("train"), "training"),
        "repetitions": _judge_repetitions(record["duplicates"].get("synthetic")),
    }
    return [{"subject": subject, "level": level, "text": text} for subject, (level, text) in findings.items()]


def list_caveats(record: dict) -> list[str]:
    """Return what the figures of this report cannot tell."""
    distance, num_features = record["distance"], record["model"]["num_features"]
    counts = record["num_images"]
    caveats = ["Features depend on the model: compare only reports made with the same one."]
    size = distance["num_images"] or counts["synthetic"]["used"]
    if size < max(num_features, FEW_IMAGES):
        caveats.append(
            f"The Frechet distance is biased upwards with few images ({size:,} per side, {num_features} features): "
            "compare it with its floor, not with published values. The kernel distance has no such bias."
        )
    if counts["held_out"]["used"] < 100:
        caveats.append(
            f"With only {counts['held_out']['used']} held-out real images, the floors and the threshold of look-alikes "
            "are rough."
        )
    for name, what in (("synthetic", "synthetic"), ("train", "real training")):
        if counts[name]["used"] < counts[name]["all"]:
            caveats.append(
                f"Only the first {record['max_images_per_class']:,} {what} images per class were compared "
                f"({counts[name]['used']:,} of {counts[name]['all']:,}): the others are unknown."
            )
    caveats.append(
        "Copies that are cropped, rotated, strongly compressed or nearly plain are not counted: look at the pairs. "
        "Finding none does not prove that the generator has not seen the test images."
    )
    return caveats


def format_distance(value: float) -> str:
    """Return a distance with three digits, or as a whole number if it has more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _level(value: float, notable: float, large: float) -> str:
    """Return the level of a value that should be small."""
    return GOOD if value < notable else LOOK if value < large else BAD


def _judge_distance(record: dict) -> tuple[str, str]:
    distance = record["distance"]
    frechet, floor = distance["frechet"]["synthetic"], distance["frechet"]["floor"]
    if frechet is None or not floor:
        return UNKNOWN, "Too few held-out real images for a floor, without which distances cannot be judged."
    kernel = distance["kernel"]
    sides = {
        "Frechet": (frechet, floor),
        "kernel": (kernel["synthetic"], max(kernel["floor"], 0) + kernel["floor_std"]),  # its expected floor is 0
    }
    levels = {
        name: _level(value, NOTABLE_RATIO * unit, LARGE_RATIO * unit) for name, (value, unit) in sides.items() if unit
    }
    meaning = {
        GOOD: "about as close to the real images as other real images are",
        LOOK: "the model can distinguish them from real images",
        BAD: "to the model they are another kind of image; training on real images must make up for it",
    }
    worst = max(levels, key=lambda name: list(meaning).index(levels[name]))
    judged_by = f"by the {worst} one, " if len(set(levels.values())) > 1 else ""
    return levels[worst], (
        f"Frechet distance {format_distance(frechet)}, {frechet / floor:.1f} times the floor of "
        f"{format_distance(floor)}; kernel {kernel['synthetic']:.2g}, floor {kernel['floor']:.2g} +- "
        f"{kernel['floor_std']:.2g}: {judged_by}{meaning[levels[worst]]}."
    )


def _judge_shifts(classes: list[dict]) -> tuple[str, str]:
    known = [entry for entry in classes if entry["shift"] is not None]
    if not known:
        return UNKNOWN, "Too few images or classes to compare class means."
    far = [entry for entry in known if entry["shift"] >= LARGE_SHIFT]
    middle = sorted(entry["shift"] for entry in known)[len(known) // 2]
    worst = ", ".join(f"{entry['class']} ({entry['shift']:.2f})" for entry in known[:3])
    text = (
        f"Median shift {middle:.2f} (0: as close as real images, 1: as far as the nearest other class); largest: "
        f"{worst}."
    )
    if far:
        return (
            BAD,
            f"{text} {len(far)} of {len(known)} are farther from their real class than the nearest other class is.",
        )
    return _level(known[0]["shift"], NOTABLE_SHIFT, LARGE_SHIFT), text


def _judge_labels(nearest: dict) -> tuple[str, str]:
    own, real = nearest["own_share"]["synthetic"], nearest["own_share"]["held_out"]
    if real is None:
        return UNKNOWN, f"{own:.0%} of the synthetic images are nearest to the mean of their own real class."
    text = (
        f"{own:.0%} of the synthetic images are nearest to their own real class; of held-out real images, {real:.0%}."
    )
    if nearest["confusions"]:
        first = nearest["confusions"][0]
        text += (
            f" Largest excess over real images: {first['class']} near {first['nearest']} ({first['share']:.0%}, real "
            f"{first['real_share'] or 0:.0%})."
        )
    return _level(real - own, NOTABLE_LOSS, LARGE_LOSS), text


def _judge_diversity(classes: list[dict], diversity: dict) -> tuple[str, str]:
    ratios = {
        entry["class"]: entry["diversity"] / entry["real_diversity"]
        for entry in classes
        if entry["diversity"] is not None and entry["real_diversity"]
    }
    if not ratios:
        return UNKNOWN, "Too few images per class."
    least = min(ratios, key=ratios.get)
    overall = diversity["synthetic"] / diversity["real"]
    level = GOOD if overall >= NOTABLE_DIVERSITY else LOOK if overall >= SMALL_DIVERSITY else BAD
    if level == GOOD and ratios[least] < SMALL_DIVERSITY:
        level = LOOK
    text = f"Images of a class differ {overall:.2f} times as much as real ones; least: {least} ({ratios[least]:.2f})."
    if level != GOOD:
        text += " A lower guidance scale or more varied prompts help."
    elif overall > LARGE_DIVERSITY:
        text += " This includes variety that real images lack, such as other colors or backgrounds."
    return level, text


def _judge_duplicates(found: dict | None, kind: str) -> tuple[str, str]:
    if found is None:
        return UNKNOWN, f"There are no real {kind} images to compare with."
    if found["num_copies"]:
        text = (
            f"{found['num_copies']:,} of {found['num_images']:,} synthetic images are practically identical to a real "
            f"{kind} image; of held-out real images, {_count_real_copies(found)}"
        )
        if not _is_excess(found["num_copies"], _expected_copies(found)):
            return LOOK, f"{text}. Real images are as similar, or their splits overlap; look at the pictures."
        consequence = "; results on the test set cannot be trusted" if kind == "test" else ""
        return BAD, f"{text}{consequence}. Look at the pictures."
    text = (
        f"{found['num_similar']:,} of {found['num_images']:,} synthetic images ({found['share_similar']:.1%}) resemble "
        f"a real {kind} image as closely as only 1% of held-out real images do; none is practically identical."
    )
    return (LOOK, f"{text} Look at the pictures.") if _has_many_similar(found) else (GOOD, text)


def _judge_repetitions(found: dict | None) -> tuple[str, str]:
    if found is None:
        return UNKNOWN, "Too few images."
    text = (
        f"{found['share_similar']:.1%} of the synthetic images resemble another one as closely as only 1% of the real "
        f"ones do; {found['num_copies']:,} are practically identical to another; of the real ones, "
        f"{_count_real_copies(found)}."
    )
    has_many_copies = _is_excess(found["num_copies"], _expected_copies(found))
    if has_many_copies and found["num_copies"] > EXPECTED_SHARE * found["num_images"]:
        return BAD, text
    return (LOOK, text) if has_many_copies or _has_many_similar(found) else (GOOD, text)


def _has_many_similar(found: dict) -> bool:
    return _is_excess(found["num_similar"], EXPECTED_SHARE * found["num_images"])


def _expected_copies(found: dict) -> float:
    """Return how many images would have a copy if their share were that of the real images."""
    return found["num_images"] * found["num_copies_of_real"] / max(found["num_calibration_images"], 1)


def _count_real_copies(found: dict) -> str:
    return f"{found['num_copies_of_real']:,} of {found['num_calibration_images']:,}"


def _is_excess(number: int, expected: float) -> bool:
    """Return whether it is more than chance explains."""
    return number > max(2 * expected, expected + 3 * math.sqrt(expected))
