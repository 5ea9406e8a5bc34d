"""A client process for test_reading.py: reads inputs by id, and answers with commits or error lines.

Cases come as JSON in lines of stdin: {"name": [kind, repository, revision, --hub_token, HF_TOKEN]}.
"""

import json
import os
import sys
import time

import torch

from utils.cli.errors import UserError
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images
from utils.hub.repositories import open_source
from utils.style.base_models import open_base_model
from utils.synthesis.sources import read_token_sources
from utils.transfer.classifiers import load_image_processor, load_pretrained, open_classifier
from utils.transfer.synthetic_images import load_synthetic, open_synthetic

SECONDS_SLEPT = []
sleep = time.sleep
# pauses between tries, without the time of the work itself
time.sleep = lambda seconds: (SECONDS_SLEPT.append(seconds), sleep(seconds))


def read_file(name: str, revision: str | None, token: str | None) -> dict:
    source = open_source(name, "--model_name_or_path", "model", revision, token)
    return {"commit": source.revision, "text": source.file("config.json").read_text()}


def read_base_model(name: str, revision: str | None, token: str | None) -> dict:
    base_model = open_base_model(name, "--pretrained_model_name_or_path", revision, token)
    base_model.load_tokenizers(), base_model.load_text_encoders(torch.float32), base_model.load_vae()
    unet = base_model.load_unet(torch.float32)
    return {"commit": base_model.source.revision, "sample_size": unet.config.sample_size}


def read_token(name: str, revision: str | None, token: str | None) -> dict:
    sources = read_token_sources(name, revision, hub_token=token)
    return {"commit": sources.token.revision, "generator": sources.generator.source.revision}


def read_real_images(name: str, revision: str | None, token: str | None) -> dict:
    images = load_real_images(RealImagesRecord(name, dataset_revision=revision), token)
    return {"commit": images.record.dataset_revision, "num_images": len(images.train) + len(images.validation)}


def read_synthetic_images(name: str, revision: str | None, token: str | None) -> dict:
    source = open_synthetic(name, revision, token)
    images = load_synthetic(source, source.record["class_names"], None, token)
    return {"commit": source.revision, "num_images": len(images)}


def read_classifier(name: str, revision: str | None, token: str | None) -> dict:
    commit = open_classifier(name, revision, token).revision
    hub_options = {"revision": commit, "token": token or None}  # as the scripts do
    load_image_processor(name, **hub_options)
    return {"commit": commit, "num_labels": load_pretrained(name, **hub_options).config.num_labels}


READERS = {
    "file": read_file,
    "base_model": read_base_model,
    "token": read_token,
    "real": read_real_images,
    "synthetic": read_synthetic_images,
    "classifier": read_classifier,
}


def answer(cases: dict) -> dict:
    answers = {}
    for case, (kind, name, revision, hub_token, env_token) in cases.items():
        os.environ.pop("HF_TOKEN", None)
        if env_token is not None:
            os.environ["HF_TOKEN"] = env_token
        SECONDS_SLEPT.clear()
        try:
            answers[case] = READERS[kind](name, revision, hub_token)
        except UserError as error:
            answers[case] = {"line": str(error)}
        answers[case]["seconds_slept"] = sum(SECONDS_SLEPT)
    return answers


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
