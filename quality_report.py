"""How good is a synthetic image set? Compare it with the real images, in figures, words and pictures.

    python quality_report.py --synthetic_dataset cars-syn
    python quality_report.py --synthetic_dataset user/cars-syn --model_name_or_path facebook/dinov2-small
    python quality_report.py --synthetic_dataset any/images --dataset_name user/cars --output_dir any-quality

It reports how far the set is from the real images, as a whole and per class; whether it is as varied; which classes can
be confused; and which images repeat each other or a real one, above all one of the test split. The real images are
those in the set's record, unless others are given. Writes quality.json, quality.png and duplicates.png.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.cli.errors import UserError, report_unwritable, run_script
from utils.cli.options import Need, option
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import check_single_process
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.cli.run_folder import check_writable
from utils.data.arguments import RealDataArguments, check_real_images_given, explain_recorded_name
from utils.hub.repositories import Source, open_source

UNUSED = [Need("here: all real images are compared, unchanged", lambda values: False)]


@dataclass
class SyntheticSetArguments:
    _argument_group_name = "synthetic images"

    synthetic_dataset: str | None = option(None, "Synthetic set: a folder of generate_synthetic.py, or a dataset id.")
    synthetic_dataset_revision: str | None = option(None, "Branch, tag or commit of the synthetic set.")


@dataclass
class ReferenceImagesArguments(RealDataArguments):
    """The labelled real images (default: those in the set's record)."""

    num_shots: int | None = option(None, argparse.SUPPRESS, needs=UNUSED)
    few_shot_seed: int = option(0, argparse.SUPPRESS, needs=UNUSED)
    max_train_samples: int | None = option(None, argparse.SUPPRESS, needs=UNUSED)
    random_flip: bool = option(True, argparse.SUPPRESS, needs=UNUSED)


@dataclass
class FeatureModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = option(
        "timm/resnet18.tv_in1k",
        "Image model whose features are compared: a model id of transformers or timm, or a folder.",
    )
    model_revision: str | None = option(None, "Branch, tag or commit of the model.")
    hub_token: str | None = option(None, "Access token of the Hub (default: HF_TOKEN, or that of `hf auth login`).")


@dataclass
class ReportArguments:
    _argument_group_name = "report"

    output_dir: str | None = option(None, "Folder for the report (default: '<synthetic set>-quality').")
    batch_size: int = option(64, "Images per forward pass of the model.")
    max_images_per_class: int = option(
        1000, "Compare at most this many images per class, the first ones; test images are not limited."
    )
    num_pairs: int = option(8, "Number of most similar pairs to show, per kind.")


def choose_real_images(source: Source, real_args: RealDataArguments) -> tuple[dict, str | None]:
    """Return the real images' record and the name of the synthetic set whose record holds it; None for flags.

    Raises:
        UserError: neither flags nor a record name the real images; other flags are given without them.
    """
    if real_args.dataset_name is not None or real_args.train_dir is not None:
        check_real_images_given(real_args)
        return asdict(real_args), None
    for name, value in asdict(real_args).items():
        if value != getattr(RealDataArguments, name):
            raise UserError(f"--{name} {value}: needs --dataset_name or --train_dir.")
    record = read_record(source.file(GENERATION_CONFIG)) if source.has_one_of([GENERATION_CONFIG]) else {}
    if record.get("real_images") is None:
        raise UserError(
            f"--synthetic_dataset {source.name}: has no {GENERATION_CONFIG} that names the real images; add "
            "--dataset_name or --train_dir."
        )
    return record["real_images"], source.name


def main(argv=None) -> dict:
    started = time.time()
    synthetic_args, real_args, model_args, report_args = ScriptArgumentParser(
        (SyntheticSetArguments, ReferenceImagesArguments, FeatureModelArguments, ReportArguments), description=__doc__
    ).parse(argv)
    check_single_process("the report is made by one process; start it with `python quality_report.py`.")
    if synthetic_args.synthetic_dataset is None:
        raise UserError("--synthetic_dataset is missing: a folder of generate_synthetic.py, or a dataset id.")
    source = open_source(
        synthetic_args.synthetic_dataset, "--synthetic_dataset", "dataset",
        synthetic_args.synthetic_dataset_revision, model_args.hub_token,
    )  # fmt: skip
    real_images, recorded_in = choose_real_images(source, real_args)
    output_dir = Path(report_args.output_dir or f"{Path(source.name).name}-quality")
    if output_dir.is_file():
        raise UserError(f"--output_dir {output_dir}: is a file; name a folder.")
    check_writable(output_dir)
    if (output_dir / "quality.json").exists():
        read_record(output_dir / "quality.json")  # raises unless it is a record of these scripts

    # these take seconds to import: only once the arguments are known to be good
    import transformers

    from utils.quality.features import load_reference_images, open_feature_model
    from utils.quality.presentation import print_quality
    from utils.quality.report import make_quality_report

    transformers.utils.logging.set_verbosity_error()  # it would list the weights of the unused head
    model = open_feature_model(
        model_args.model_name_or_path, "--model_name_or_path", model_args.model_revision, model_args.hub_token
    )
    with explain_recorded_name(RealDataArguments(**real_images), recorded_in):
        real = load_reference_images(real_images, model_args.hub_token)
    print("\n".join(real.remarks))
    with report_unwritable(
        output_dir, lambda: "free some space or choose another folder, and run the same command again"
    ):
        record = make_quality_report(
            source, real, model, output_dir, batch_size=report_args.batch_size,
            max_images_per_class=report_args.max_images_per_class, num_pairs=report_args.num_pairs,
        )  # fmt: skip
    print_quality(record)
    print(f"Written to {output_dir}: quality.json, quality.png, duplicates.png; {time.time() - started:.0f} s in all.")
    return record


if __name__ == "__main__":
    run_script(main)
