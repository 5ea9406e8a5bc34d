"""Leave the worst synthetic images of each class out of training, by scores.

    python filter_synthetic.py --synthetic_dataset cars-syn
    python filter_synthetic.py --synthetic_dataset cars-syn --scores words --drop_share 0.2
    python filter_synthetic.py --synthetic_dataset cars-syn --scores probe --min_score 0.05

Each image gets the scores that are asked for; more is better. The worst images of each class are marked as left out
in scores.parquet, in the folder of the set; none is deleted. train_bridged.py and compare_transfer.py leave them out,
and say so, unless given --use_rejected. The scores use the real training images of the set's record, or of the flags,
and no others. filter.png shows the best images that are left out and the worst that are kept.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from utils.cli.errors import UserError, report_unwritable, run_script
from utils.cli.options import Need, option
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import check_single_process
from utils.cli.records import BRIDGED_CONFIG, read_record
from utils.cli.run_folder import check_writable
from utils.data.arguments import RealDataArguments, explain_recorded_name
from utils.data.left_out import FILTER_PICTURE, SCORES, open_judged_set
from utils.hub.repositories import Source, open_source

PROBE, DISTANCE, WORDS, CLASSIFIER = "probe", "distance", "words", "classifier"


def among_scores(name: str) -> Need:
    """Return the need that a score is asked for."""
    return Need(f"without {name} among --scores", lambda values: name in values["scores"], f"add {name} or ")


@dataclass
class FilteredSetArguments:
    _argument_group_name = "synthetic images"

    synthetic_dataset: str | None = option(None, "Synthetic set: a folder of generate_synthetic.py.")


@dataclass
class ScoreArguments:
    _argument_group_name = "scores"

    scores: list[str] = option(
        [PROBE, DISTANCE],
        "What to measure: probe (probability of the image's own class, by logistic regression on the real training "
        "images), distance (cosine with the most similar real image of its class), words (probability of its class by "
        "a model of images and text), classifier (probability of its class by a classifier).",
        nargs="+", choices=(PROBE, DISTANCE, WORDS, CLASSIFIER),
    )  # fmt: skip
    model_name_or_path: str = option(
        "timm/resnet18.tv_in1k", "Image model whose features probe and distance use: an id of transformers or timm, or "
        "a folder.",
    )  # fmt: skip
    model_revision: str | None = option(None, "Branch, tag or commit of that model.")
    words_model: str = option(
        "openai/clip-vit-base-patch32", "Model of images and text of the score words, an id or a folder.",
        needs=[among_scores(WORDS)],
    )  # fmt: skip
    classifier: str | None = option(
        None, "Classifier of the same classes of the score classifier, an id or a folder; trained on real images only.",
        needs=[among_scores(CLASSIFIER)],
    )  # fmt: skip
    batch_size: int = option(64, "Images that a model sees at a time.")
    hub_token: str | None = option(None, "Access token (default: HF_TOKEN or that of `hf auth login`).")


@dataclass
class FilterArguments:
    _argument_group_name = "filter"

    drop_by: str | None = option(None, "Score that decides (default: the first of --scores).")
    drop_share: float = option(0.1, "Share of each class's images that is left out, in [0, 1).")
    min_score: float | None = option(None, "Leave out what scores less, whatever the share.", needs=[])


GROUPS = (FilteredSetArguments, RealDataArguments, ScoreArguments, FilterArguments)


def check_arguments(score_args: ScoreArguments, filter_args: FilterArguments, given: set[str]) -> None:
    """Check what needs no images.

    Raises:
        UserError: a value is wrong, or two flags contradict each other.
    """
    if len(set(score_args.scores)) < len(score_args.scores):
        raise UserError(f"--scores {' '.join(score_args.scores)}: duplicate values.")
    filter_args.drop_by = filter_args.drop_by or score_args.scores[0]
    if filter_args.drop_by not in score_args.scores:
        raise UserError(f"--drop_by {filter_args.drop_by}: must be one of --scores ({', '.join(score_args.scores)}).")
    if filter_args.min_score is not None and "drop_share" in given:
        raise UserError("--min_score: replaces --drop_share; give one of them.")
    if CLASSIFIER in score_args.scores and score_args.classifier is None:
        raise UserError("--scores classifier: needs --classifier.")


def check_classifier(source: Source, record: dict) -> None:
    """Check that a classifier of ours was not trained on the images that it is to score.

    Raises:
        UserError: it was.
    """
    if not source.has_one_of([BRIDGED_CONFIG]):
        return
    trained_on = read_record(source.file(BRIDGED_CONFIG))["synthetic_dataset"]
    if trained_on is not None:
        raise UserError(
            f"--classifier {source.name}: was trained on synthetic images ({trained_on['name']}), which it would like "
            "for that; take one of real images (train_bridged.py --method lp_ft)."
        )


def main(argv=None) -> dict:
    parser = ScriptArgumentParser(GROUPS, description=__doc__)
    set_args, real_args, score_args, filter_args = parser.parse(argv)
    check_single_process("the scores are made by one process; start it with `python filter_synthetic.py`.")
    check_arguments(score_args, filter_args, parser.given)
    source, record = open_judged_set(set_args.synthetic_dataset)
    check_writable(Path(source.name))
    recorded = record["real_images"]
    if real_args.dataset_name is None and real_args.train_dir is None:
        if recorded is None:
            raise UserError(
                f"--synthetic_dataset {source.name}: its record names no real images; give --dataset_name or "
                "--train_dir."
            )
        parser.fill_in([real_args], recorded)
    token = score_args.hub_token
    model = words = classifier = None
    # these take seconds to import: only once the arguments are known to be good
    import transformers

    from utils.quality.features import open_feature_model
    from utils.quality.filtering import draw_filter, load_scored_images, print_filter, score_images
    from utils.quality.scores import ScoredSet, choose_left_out

    transformers.utils.logging.set_verbosity_error()
    if {PROBE, DISTANCE} & set(score_args.scores):
        model = open_feature_model(
            score_args.model_name_or_path, "--model_name_or_path", score_args.model_revision, token
        )
    if WORDS in score_args.scores:
        words = open_source(score_args.words_model, "--words_model", "model", None, token)
    if CLASSIFIER in score_args.scores:
        classifier = open_source(score_args.classifier, "--classifier", "model", None, token)
        check_classifier(classifier, record)
    folder = Path(source.name)
    with (
        report_unwritable(folder, lambda: "make room, and run the same command again"),
        explain_recorded_name(real_args, source.name if recorded else None),
        tempfile.TemporaryDirectory(prefix="features-") as work_dir,
    ):
        images = load_scored_images(source, real_args, token)
        print(f"Real images: {len(images.real):,}, those that training takes.")
        scores = score_images(
            images, score_args.scores, model, words, classifier, score_args.batch_size, Path(work_dir)
        )
        is_left_out = choose_left_out(
            scores[filter_args.drop_by], images.labels, filter_args.drop_share, filter_args.min_score
        )
        empty = np.setdiff1d(images.labels, images.labels[~is_left_out])
        if empty.size:
            names = ", ".join(images.class_names[label] for label in empty)
            raise UserError(
                f"--min_score {filter_args.min_score:g}: would leave no image of {names}; give a lower one."
            )
        scored = ScoredSet(images.class_names, images.labels, images.class_indices, scores, is_left_out)
        used = {PROBE: model, DISTANCE: model, WORDS: words, CLASSIFIER: classifier}
        about = {
            "schema_version": 1, "fingerprint": record["fingerprint"], "drop_by": filter_args.drop_by,
            "drop_share": None if filter_args.min_score is not None else filter_args.drop_share,
            "min_score": filter_args.min_score, "real_images": asdict(real_args),
            "models": {name: {"id": used[name].name, "revision": used[name].revision} for name in score_args.scores},
        }  # fmt: skip
        scored.save(folder, about)
        draw_filter(folder / FILTER_PICTURE, images, scored, filter_args.drop_by)
    print_filter(scored, filter_args.drop_by)
    num_images, num_left_out = len(is_left_out), int(is_left_out.sum())
    print(
        f"Written to {folder}: {SCORES}, {FILTER_PICTURE}. Training leaves {num_left_out:,} of {num_images:,} images "
        f"out; to use all of them again, give --use_rejected or remove {SCORES}."
    )
    return about | {"num_images": num_images, "num_left_out": num_left_out}


if __name__ == "__main__":
    run_script(main)
