"""The usual way to draw a labelled image set: loop over classes, one call per batch, image files in class folders.

    python benchmarks/peer_loop.py --pipeline_dir demo/generator --class_names_file names.txt --output_dir images

Research code for synthetic training images is such a loop: every call draws its noise from a global generator, encodes
the prompt again, and writes its images before the next call.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm

BAR = "images of the loop"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline_dir", required=True)
    parser.add_argument("--class_names_file", type=Path, required=True, help="one name per line")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--num_images_per_class", type=int, default=1000, help="a multiple of --batch_size (default: 1000)"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--image_format", choices=["png", "jpeg"], default="png")
    args = parser.parse_args(argv)
    options = {"quality": 95} if args.image_format == "jpeg" else {}
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline_dir, dtype=dtype)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    class_names = args.class_names_file.read_text().split()
    with tqdm(total=args.num_images_per_class * len(class_names), desc=BAR) as bar:
        for name in class_names:
            folder = args.output_dir / name
            folder.mkdir(parents=True)
            for start in range(0, args.num_images_per_class, args.batch_size):
                images = pipe(
                    f"A good photo of the {name}", num_images_per_prompt=args.batch_size,
                    num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
                ).images  # fmt: skip
                for number, image in enumerate(images, start):
                    image.save(folder / f"{number:06d}.{args.image_format}", **options)
                bar.update(len(images))


if __name__ == "__main__":
    main()
