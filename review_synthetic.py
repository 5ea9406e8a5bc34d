"""Review synthetic images by eye: a page on this machine where people accept or reject them.

    python review_synthetic.py --synthetic_dataset cars-syn
    python review_synthetic.py --synthetic_dataset cars-syn --sample 20 --reviewer anna
    python review_synthetic.py --synthetic_dataset cars-syn --summary

The page shows the images of each class next to real ones, the most doubtful first where filter_synthetic.py has scored
them. Every verdict is saved at once to review.json in the folder of the set. train_bridged.py and compare_transfer.py
leave rejected images out unless given --use_rejected. --sample estimates the share of good images of each class.
"""

import getpass
import importlib.util
import ipaddress
import os
import time
from dataclasses import dataclass
from pathlib import Path

from utils.cli.errors import UserError, run_script
from utils.cli.options import Need, option
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import check_single_process
from utils.cli.run_folder import check_writable
from utils.data.arguments import RealDataArguments, check_real_images_given, explain_recorded_name
from utils.data.left_out import open_judged_set

AUTH = "BRIDGED_REVIEW_AUTH"
WITHOUT_SUMMARY = Need("with --summary", lambda values: not values["summary"])


@dataclass
class ReviewedSetArguments:
    _argument_group_name = "synthetic images"

    synthetic_dataset: str | None = option(None, "Synthetic set: a folder of generate_synthetic.py.")


@dataclass
class ReviewArguments:
    _argument_group_name = "review"

    reviewer: str | None = option(
        None, "Name under which verdicts are saved (default: the login name).", needs=[WITHOUT_SUMMARY]
    )
    sample: int | None = option(
        None, "Review this many images per class, evenly spaced, and estimate the share of good ones (default: all)."
    )
    sample_seed: int = option(0, "Which images the sample and the blind test have.")
    page_size: int = option(24, "Images on a page.", needs=[WITHOUT_SUMMARY])
    show_real: bool = option(
        True, "Show real images next to the synthetic ones, and offer the blind test.", needs=[WITHOUT_SUMMARY]
    )
    summary: bool = option(False, "Print what the verdicts come to, without a page.")
    hub_token: str | None = option(None, "Access token (default: HF_TOKEN or that of `hf auth login`).")


@dataclass
class ServerArguments:
    _argument_group_name = "page"

    host: str = option(
        "127.0.0.1", f"Address to serve the page on; other than this machine's own, {AUTH} must be set.",
        needs=[WITHOUT_SUMMARY],
    )  # fmt: skip
    port: int | None = option(None, "Port (default: the first free one from 7860).", needs=[WITHOUT_SUMMARY])
    share: bool = option(
        False, f"Also serve the page on a public address of Gradio's, with the login user:password of {AUTH} in the "
        "environment.", needs=[WITHOUT_SUMMARY],
    )  # fmt: skip


GROUPS = (ReviewedSetArguments, ReviewArguments, ServerArguments, RealDataArguments)


def find_reviewer(name: str | None) -> str:
    """Return the name of the reviewer, by default the login name.

    Raises:
        UserError: it is empty, or there is no login name.
    """
    try:
        name = getpass.getuser() if name is None else name.strip()
    except (OSError, KeyError):
        name = ""
    if not name:
        raise UserError("--reviewer is missing: the name under which verdicts are saved.")
    return name


def read_login(args: ServerArguments) -> tuple[str, str] | None:
    """Return user and password, None where none are needed. They are in the environment, and so in no log.

    Raises:
        UserError: others could open the page, and no login is set.
    """
    user, _, password = os.environ.get(AUTH, "").partition(":")
    if user and password:
        return user, password
    if os.environ.get(AUTH):
        raise UserError(f"{AUTH}: must be user:password.")
    try:
        is_own = args.host == "localhost" or ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        is_own = False
    if args.share or not is_own:
        flag = "--share" if args.share else f"--host {args.host}"
        raise UserError(f"{flag}: others can open the page; set {AUTH}=user:password in the environment.")
    return None


def load_photos(record: dict, folder: Path, real_args: RealDataArguments, token: str | None):
    """Return the real images that the flags name; `folder` is the set whose `record` named them, if it did.

    Raises:
        UserError: they cannot be loaded, or have other classes.
    """
    from utils.data.image_set import RealImagesRecord
    from utils.data.real_images import load_real_images
    from utils.review.real_photos import RealPhotos

    check_real_images_given(real_args)
    with explain_recorded_name(real_args, folder):
        real = load_real_images(RealImagesRecord.from_arguments(real_args), token)
    return RealPhotos.match(real, record["class_names"])


def serve(page, args: ServerArguments, login: tuple[str, str] | None) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the port is taken, or the address is not one of this machine.
    """
    from utils.review.page import start_page

    try:
        addresses, stop = start_page(page, args.host, args.port, args.share, login)
    except OSError as error:
        raise UserError(f"--host {args.host}: the page cannot be served ({error}); try another --port.") from None
    print(f"Review page: {' and '.join(addresses)} (Ctrl-C ends it; every verdict is saved as it is given)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()
    finally:
        stop()


def main(argv=None) -> dict:
    parser = ScriptArgumentParser(GROUPS, description=__doc__)
    set_args, review_args, server_args, real_args = parser.parse(argv)
    check_single_process("the page is served by one process; start it with `python review_synthetic.py`.")
    source, record = open_judged_set(set_args.synthetic_dataset)
    folder = Path(source.name)
    if not review_args.summary:
        if importlib.util.find_spec("gradio") is None:
            raise UserError("the review page needs Gradio: run `pip install -r requirements-review.txt`.")
        reviewer, login = find_reviewer(review_args.reviewer), read_login(server_args)
        check_writable(folder)
    # these take seconds to import: only once the arguments are known to be good
    from utils.review.page import ReviewPage
    from utils.review.real_photos import BlindTest
    from utils.review.set_images import Thumbnails, choose_shown, open_set_images, read_scores
    from utils.review.summary import print_summary, summarise_review
    from utils.review.verdicts import Review

    images = open_set_images(folder)
    review = Review(folder, record["fingerprint"])
    score_name, scores = read_scores(folder, images, record["fingerprint"]) or (None, None)
    shown = choose_shown(images, scores, review_args.sample, review_args.sample_seed)
    is_sample = review_args.sample is not None
    if not review_args.summary:
        photos = blind = None
        is_recorded = real_args.dataset_name is None and real_args.train_dir is None
        if is_recorded and record["real_images"] is not None:
            parser.fill_in([real_args], record["real_images"])
        if review_args.show_real and not (is_recorded and record["real_images"] is None):
            photos = load_photos(record, folder if is_recorded else None, real_args, review_args.hub_token)
            blind = BlindTest.draw(images, photos, review_args.sample_seed)
        page = ReviewPage(
            images, Thumbnails(images), review, reviewer, shown, review_args.page_size, is_sample, score_name, scores,
            photos, blind,
        )  # fmt: skip
        serve(page, server_args, login)
    heads, rows, lines = summarise_review(review, images, shown, is_sample)
    print_summary(heads, rows, lines)
    return {"heads": heads, "rows": rows, "lines": lines}


if __name__ == "__main__":
    run_script(main)
