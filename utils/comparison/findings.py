"""The findings of a comparison in sentences: which method to use per number of images, and how the others did.

The method with the best test accuracy is named together with its gain on the same test images. The gain of the best of
many methods is likely overstated, and a sentence says so. The search's validation accuracies cannot choose instead:
they come from one seed and the searched shots, and are themselves the best of several recipes. No torch.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import numpy as np

from utils.comparison.grid import Row, shots_title
from utils.comparison.statistics import Gain, paired_gain
from utils.transfer.methods import DEFAULT_METHOD

USUAL = ("bridged", DEFAULT_METHOD, "mix")  # the paper's method, ours, and the simplest alternative
MAX_HIGHLIGHTS = 6  # more colours are hard to tell apart
Correct = dict[Row, dict[int | None, np.ndarray]]


@dataclass(frozen=True)
class Recommendation:
    """The method to use for one number of images, and why.

    `use` is the method with synthetic images that has the best mean accuracy among those with a clear gain over
    `real_only`, or `real_only` if none has; None if that cannot be judged. `real_only` is the best method without
    synthetic images. `synthetic` is the method that `gain` is about: `use`, or the best method without a clear gain.
    `leader` has a higher mean than `use`, but no clear gain. What was not run is None.
    """

    num_shots: int | None
    use: Row | None
    real_only: Row | None
    synthetic: Row | None = None
    gain: Gain | None = None
    leader: Row | None = None

    def to_dict(self) -> dict:
        """Return the entry of `comparison.json`: each row as its label and volume."""
        rows = {name: getattr(self, name) for name in ("use", "real_only", "synthetic", "leader")}
        named = {name: row and {"method": row.label, "volume": row.volume} for name, row in rows.items()}
        return {"num_shots": self.num_shots, **named, "gain": self.gain and asdict(self.gain)}


def recommend(correct: Correct) -> list[Recommendation]:
    """Return what to use for each number of images; `correct` is what `stack_correct` returns.

    With several volumes, the methods with synthetic images are compared at the largest.
    """
    top = largest_volume(correct)
    return [_recommend_one(correct, top, num_shots) for num_shots in correct[top[0]]]


def list_recommendations(by_classifier: dict[str, Correct]) -> dict[str, list[dict]]:
    """Return the entries of `comparison.json` by classifier: what to use for each number of images."""
    return {label: [item.to_dict() for item in recommend(correct)] for label, correct in by_classifier.items()}


def _recommend_one(correct: Correct, rows: list[Row], num_shots: int | None) -> Recommendation:
    def mean(row: Row) -> float:
        return correct[row][num_shots].mean()

    # at a tie, the method that takes as many steps as the others
    real_only = max(
        (row for row in rows if not row.method.uses_synthetic),
        key=lambda row: (mean(row), row.method.flags["match_steps"]), default=None,
    )  # fmt: skip
    synthetic = sorted((row for row in rows if row.method.uses_synthetic), key=mean, reverse=True)
    if real_only is None:
        return Recommendation(num_shots, synthetic[0], None, synthetic[0])
    if not synthetic:
        return Recommendation(num_shots, real_only, real_only)
    gains = {row: paired_gain(correct[row][num_shots], correct[real_only][num_shots]) for row in synthetic}
    clear = next((row for row in synthetic if gains[row].verdict == "gains"), None)
    if clear is not None:
        leader = synthetic[0] if mean(synthetic[0]) > mean(clear) else None
        return Recommendation(num_shots, clear, real_only, clear, gains[clear], leader)
    is_judged = all(gain.low is not None or gain.mean <= 0 for gain in gains.values())
    use = real_only if is_judged else None
    return Recommendation(num_shots, use, real_only, synthetic[0], gains[synthetic[0]])


def describe_findings(by_classifier: dict[str, Correct], baseline: Row | None) -> list[str]:
    """Return the findings in sentences, positive or not: first which method to use for each number of images.

    `by_classifier` maps the classifiers' labels to what `stack_correct` returns; the table's gains are over `baseline`.
    With several volumes the sentences are about the largest, and about its gain over the smallest. After the method to
    use come the bridged methods, other methods that beat the best of them, and the limits of the figures. With several
    classifiers each sentence names its classifier, and the methods to use come first for all of them, in the given
    order; the classifiers are not compared with each other.
    """
    answers, details, limits = [], [], []
    for label, correct in by_classifier.items():
        recommendations = recommend(correct)
        answer, *reasons = describe_recommendations(recommendations, correct)
        sentences = [*reasons, *_describe_methods(correct, baseline)]
        if len(by_classifier) > 1:
            answer, *sentences = (f"{label}: {_uncapitalise(sentence)}" for sentence in (answer, *sentences))
        answers.append(answer)
        details += sentences
        limits += describe_limits(recommendations, correct)
    return [*answers, *details, *dict.fromkeys(limits)]


def _describe_methods(correct: Correct, baseline: Row | None) -> list[str]:
    sentences, top = [], largest_volume(correct)
    bridged = [row for row in top if row.is_bridged]
    if baseline is not None and bridged:
        sentences += _describe_bridged(correct, baseline, bridged)
    sentences += _describe_rivals(correct, [row for row in top if not row.is_bridged and row != baseline], bridged)
    if bridged:
        smallest = min((row for row in correct if row.label == bridged[0].label), key=lambda row: row.volume or 0)
        if smallest != bridged[0]:
            change = f"{bridged[0].volume} synthetic images per class instead of {smallest.volume}"
            added = _describe_gains(correct[bridged[0]], correct[smallest])
            sentences.append(f"{bridged[0].label}, {change}: {added}.")
    return sentences


def describe_recommendations(recommendations: list[Recommendation], correct: Correct) -> list[str]:
    """Return which method to use and its gain: one sentence, or one for each number of images if these are over two.

    If there are several, the first names the method for every number of images, with its gain over the best method
    without synthetic images.
    """
    parts = [_describe_one(item, correct[_shown(item)][item.num_shots].mean()) for item in recommendations]
    if len(parts) <= 2:
        return [f"{_capitalise('; '.join(parts))}."]
    choices: dict[Row | None, list] = {}
    for item in recommendations:
        choices.setdefault(item.use, []).append(item.num_shots)
    unknown = choices.pop(None, [])
    gains = {item.num_shots: item.gain for item in recommendations if item.use and item.use == item.synthetic}
    answers = [f"use {', '.join(f'{_name(row)} {_join(shots, gains)}' for row, shots in choices.items())}"]
    answers = answers if choices else []
    answers += [f"{_join(unknown)} it cannot be judged which method to use"] if unknown else []
    if any(gains.values()):
        answers.append("in parentheses the gain over the best method without synthetic images")
    return [f"{_capitalise('; '.join(answers))}.", *(f"{_capitalise(part)}." for part in parts)]


def _describe_one(item: Recommendation, accuracy: float) -> str:
    """Return e.g. `use mix with 1 shot: 72.5 %, +19.0 points [17.1, 20.9] over vanilla_mixup, the best without ...`."""
    at, percent = _with(item.num_shots), f"{100 * accuracy:.1f} %"
    if item.real_only is None:
        return (
            f"use {_name(item.use)} {at}: {percent}, the best here; no method was run on real images alone, so the "
            "gain of synthetic images is not known"
        )
    if item.synthetic is None:
        return f"use {item.use.label} {at}: {percent}; no method with synthetic images was run"
    if item.use is None:
        return (
            f"{at} it cannot be judged whether synthetic images help: {_name(item.synthetic)} {percent}, {item.gain} "
            f"over {item.real_only.label}"
        )
    if item.use == item.real_only:
        if item.gain.verdict == "loses":
            worse = f"{_name(item.synthetic)}, the best with synthetic images, loses {item.gain}"
            return f"use {item.use.label} {at}: {percent}; {worse}"
        return (
            f"use {item.use.label} {at}: {percent}, no method with synthetic images gains clearly over it "
            f"({_name(item.synthetic)} {item.gain})"
        )
    gain = f"{item.gain.mean:+.1f} points [{item.gain.low:.1f}, {item.gain.high:.1f}]"
    over = f"{item.real_only.label}, the best without synthetic images"
    leader = "" if item.leader is None else f" ({item.leader.label} has a higher mean, but does not gain clearly)"
    return f"use {_name(item.use)} {at}: {percent}, {gain} over {over}{leader}"


def describe_limits(recommendations: list[Recommendation], correct: Correct) -> list[str]:
    """Return what the figures do not tell: the choice on the test images, and the luck of a single seed."""
    limits = []
    num_synthetic = sum(row.method.uses_synthetic for row in largest_volume(correct))
    if num_synthetic > 1 and any(item.gain and item.use == item.synthetic for item in recommendations):
        limits.append(
            f"The method to use was chosen among {num_synthetic} with synthetic images on the same test images, so its "
            "gain is likely overstated."
        )
    if len(next(iter(next(iter(correct.values())).values()))) == 1:
        limits.append("The intervals cover the draw of the test images, not the luck of this one seed.")
    return limits


def describe_guards(results: dict[str, dict[Row, dict]]) -> list[str]:
    """Return in sentences which methods left synthetic images out, and how often; `results` are those of the runs."""
    sentences = []
    for label, by_row in results.items():
        for row, by_shots in by_row.items():
            dropped = {
                num_shots: sum(run.get("guard", {}).get("synthetic_share") == 0 for run in runs)
                for num_shots, runs in by_shots.items()
            }
            parts = [
                f"{number} of {len(by_shots[num_shots])} runs {_with(num_shots)}"
                for num_shots, number in dropped.items()
                if number
            ]
            if parts:
                where = f"{label}: " if len(results) > 1 else ""
                sentences.append(f"{where}{_name(row)} left the synthetic images out in {', '.join(parts)}.")
    return sentences


def list_highlights(by_classifier: dict[str, Correct], baseline: Row | None) -> list[str]:
    """Return the methods that pictures show in colour, at most `MAX_HIGHLIGHTS`.

    First the reference, then the default, then those that the answers name, the ones named most often first, then the
    usual ones, then others in the order of the table.
    """
    named = Counter(
        label
        for correct in by_classifier.values()
        for item in recommend(correct)
        for label in {row.label: None for row in (item.use, item.real_only, item.synthetic, item.leader) if row}
    )
    labels = list(dict.fromkeys(row.label for correct in by_classifier.values() for row in correct))
    first = [*([baseline.label] if baseline else []), DEFAULT_METHOD, *(label for label, _ in named.most_common())]
    return [label for label in dict.fromkeys([*first, *USUAL, *labels]) if label in labels][:MAX_HIGHLIGHTS]


def largest_volume(correct: Correct) -> list[Row]:
    """Return the rows with the largest volume of their method."""
    largest = {row.label: row for row in sorted(correct, key=lambda row: row.volume or 0)}
    return [row for row in correct if largest[row.label] == row]


def _describe_bridged(correct: Correct, baseline: Row, bridged: list[Row]) -> list[str]:
    runs = next(iter(correct[baseline].values()))
    what = "folds" if isinstance(runs, np.ma.MaskedArray) else "seeds"
    scope = f"Over {len(runs)} {what}" if len(runs) > 1 else "In a single run (one seed)"
    against = baseline.label if baseline.label == "vanilla_matched" else f"{baseline.label}, which took fewer steps"
    first, *others = (f"{row.label} {_describe_gains(correct[row], correct[baseline])}." for row in bridged)
    return [f"{scope}, in points of accuracy [95 % interval] over {against}: {first}", *others]


def _describe_gains(by_shots: dict, others: dict) -> str:
    """Return `gains at 1 shot (+9.1 [8.0, 10.2]); makes no clear difference ...`, by verdict."""
    parts = {}
    for num_shots, right in by_shots.items():
        gain = paired_gain(right, others[num_shots])
        parts.setdefault(gain.verdict, []).append(f"{_at(num_shots)} ({gain})")
    return "; ".join(f"{verdict} {', '.join(gains)}" for verdict, gains in parts.items())


def _describe_rivals(correct: Correct, rivals: list[Row], bridged: list[Row]) -> list[str]:
    sentences = []
    for rival in rivals if bridged else []:
        parts = []
        for num_shots, right in correct[rival].items():
            best = max(bridged, key=lambda row, shots=num_shots: correct[row][shots].mean())
            lead = paired_gain(right, correct[best][num_shots])
            if lead.verdict == "gains":
                parts.append(f"{best.label} {_at(num_shots)} ({lead})")
        if parts:
            sentences.append(f"{rival.label} beats the best bridged method: {', '.join(parts)}.")
    return sentences


def _shown(item: Recommendation) -> Row:
    return item.use or item.synthetic


def _name(row: Row) -> str:
    return row.label if row.volume is None else f"{row.label} ({row.volume} synthetic images per class)"


def _at(num_shots: int | None) -> str:
    return "with all images" if num_shots is None else f"at {shots_title(num_shots)}"


def _with(num_shots: int | None) -> str:
    return f"with {shots_title(num_shots)}"


def _join(shots: list[int | None], gains: Mapping[int | None, Gain] = MappingProxyType({})) -> str:
    """Return `with 1, 2 and 4 shots`, with known gains in parentheses: `with 1 (+9.1 [8.0, 10.2]) and 4 shots`."""
    *others, last = ((num_shots, f" ({gain})" if (gain := gains.get(num_shots)) else "") for num_shots in shots)
    listed = ", ".join(f"{num_shots}{gain}" for num_shots, gain in others)
    return f"with {listed} and {shots_title(last[0])}{last[1]}" if others else f"{_with(last[0])}{last[1]}"


def _uncapitalise(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _capitalise(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
