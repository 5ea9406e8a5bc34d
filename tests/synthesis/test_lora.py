"""LoRA adapters of a generator: pinned, checked before a model loads, fused, recorded."""

import functools
import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import DiffusionPipeline, LCMScheduler
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from generate_synthetic import main
from tests.style.pipelines import publish
from tests.synthesis.test_sampling import PROMPTS, SEEDS, assert_same, draw_alone
from tests.synthesis.tokens import open_folder, save_token, shard_hashes
from utils.cli.errors import UserError
from utils.synthesis.lora import open_lora
from utils.synthesis.sampling import Sampler, load_pipeline

pytest_plugins = ["tests.synthesis.fixtures", "tests.local_hub.fixtures"]
KINDS = ["tiny_pipeline_dir", "tiny_xl_pipeline_dir", "tiny_sd3_pipeline_dir"]
WEIGHTS = "pytorch_lora_weights.safetensors"
CPU = torch.device("cpu")


def save_lora(pipeline_dir, folder, seed=0):
    """Write a large random adapter of the denoiser's attention, as diffusers' scripts do."""
    pipe = DiffusionPipeline.from_pretrained(pipeline_dir)
    part = "unet" if "unet" in pipe.components else "transformer"
    denoiser = pipe.components[part]
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
    torch.manual_seed(seed)
    for name, parameter in denoiser.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    type(pipe).save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(denoiser)})
    return folder


@pytest.fixture
def lora_dir(tiny_pipeline_dir, tmp_path):
    return save_lora(tiny_pipeline_dir, tmp_path / "lcm-lora")


@pytest.fixture
def flags(tiny_pipeline_dir, tmp_path):
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    return ["--pretrained_model_name_or_path", str(tiny_pipeline_dir), "--class_names_file",
            str(tmp_path / "names.txt"), "--num_images_per_class", "2", "--batch_size", "2", "--image_format", "png",
            "--output_dir", str(tmp_path / "set")]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_that_the_pipeline_draws_with_the_adapter(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    lora = open_lora(f"{save_lora(folder, tmp_path / 'lora')}:0.5", None, None)
    lora.check(open_folder(folder))
    pipe = load_pipeline(open_folder(folder), None, "default", torch.float32, CPU, [lora])
    pixels, _ = Sampler(pipe, resolution=32, num_inference_steps=2, num_at_a_time=3).draw(PROMPTS, SEEDS, 4.0)
    assert not hasattr(pipe.components.get("unet", pipe.components.get("transformer")), "peft_config")
    user = DiffusionPipeline.from_pretrained(folder)
    without = draw_alone(user, PROMPTS[0], SEEDS[0], guidance_scale=4.0)
    user.load_lora_weights(tmp_path / "lora", adapter_name="a")
    user.set_adapters(["a"], [0.5])
    for prompt, seed, drawn in zip(PROMPTS, SEEDS, pixels):
        assert_same(drawn, draw_alone(user, prompt, seed, guidance_scale=4.0))
    assert abs(without - pixels[0]).max() > 5


def test_a_distilled_adapter_brings_its_scheduler_steps_and_guidance(flags, lora_dir, tmp_path, capsys, monkeypatch):
    made, step = [], LCMScheduler.step

    @functools.wraps(step)  # the pipeline inspects its parameters
    def count(self, *args, **kwargs):
        made.append(len(args[2]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LCMScheduler, "step", count)
    main([*flags, "--lora", f"{lora_dir}:0.8"])
    assert made == [1, 1] + [2] * 4 * 2  # two trials, then four steps of two batches
    captured = capsys.readouterr()
    assert (
        "--scheduler LCMScheduler --num_inference_steps 4 --guidance_scale 1, as the name lcm-lora says."
        in captured.out
    )
    assert "No LoRA keys" not in captured.err
    settings = json.loads((tmp_path / "set/generation_config.json").read_text())["settings"]
    chosen = {"scheduler": "LCMScheduler", "num_inference_steps": 4, "guidance_scale": [1]}
    assert settings == settings | chosen
    lora = {"lora": str(lora_dir), "lora_revision": None, "lora_filename": WEIGHTS, "lora_scale": 0.8}
    assert settings == settings | lora
    assert "with the LoRA adapter" in (tmp_path / "set/README.md").read_text()
    before = shard_hashes(tmp_path / "set")
    (tmp_path / "set/data/train-00000.parquet").unlink()
    main([*flags, "--lora", f"{lora_dir}:0.8"])
    assert shard_hashes(tmp_path / "set") == before
    for other, difference in (
        (["--lora", f"{lora_dir}:0.7"], "lora_scale was 0.8, now 0.7"),
        ([], "lora was .*, now None"),
    ):
        with pytest.raises(UserError, match=f"was made with other settings .*{difference}"):
            main([*flags, *other])
    assert shard_hashes(tmp_path / "set") == before


def test_several_adapters_are_fused_and_recorded_as_lists(tiny_pipeline_dir, flags, lora_dir, tmp_path):
    other = save_lora(tiny_pipeline_dir, tmp_path / "other", seed=1)
    main([*flags, "--num_inference_steps", "2", "--lora", f"{lora_dir}:0.5", str(other)])
    settings = json.loads((tmp_path / "set/generation_config.json").read_text())["settings"]
    lists = {"lora": [str(lora_dir), str(other)], "lora_scale": [0.5, 1.0], "lora_filename": [WEIGHTS] * 2}
    assert settings == settings | lists | {"scheduler": "LCMScheduler"}
    card = (tmp_path / "set/README.md").read_text()
    assert card.count("with the LoRA adapter") == 2 and "of the adapters and of the real" in card
    assert f"- `{other}`: " in card
    row = load_dataset(str(tmp_path / "set"), split="train")[1]
    user = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    user.scheduler = LCMScheduler.from_config(user.scheduler.config)
    user.load_lora_weights(lora_dir, adapter_name="a")
    user.load_lora_weights(other, adapter_name="b")
    user.set_adapters(["a", "b"], [0.5, 1.0])
    expected = draw_alone(user, row["prompt"], row["seed"], guidance_scale=1.0)
    user.set_adapters(["a"], [0.5])
    of_one = draw_alone(user, row["prompt"], row["seed"], guidance_scale=1.0)
    assert abs(np.asarray(row["image"]) - expected).max() <= 4 < 20 < abs(of_one - expected).max()
    with pytest.raises(UserError, match="lora_scale was .0.5, 1.0., now .0.5, 2.0."):
        main([*flags, "--num_inference_steps", "2", "--lora", f"{lora_dir}:0.5", f"{other}:2"])
    with pytest.raises(UserError, match="2 of them set how to sample .*: the name lcm-lora says; .*; give only one"):
        main([*flags, "--lora", str(lora_dir), f"{lora_dir}:0.5"])
    with pytest.raises(UserError, match="--lora_revision main: has 1 values for 2 adapters; give one for each"):
        main([*flags, "--lora", str(lora_dir), str(other), "--lora_revision", "main"])


def test_an_adapter_for_other_channels_is_one_line_before_a_model_loads(lora_dir, flags, copy_pipeline, monkeypatch):
    from diffusers import AutoPipelineForText2Image

    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    wider = copy_pipeline(unet={"block_out_channels": [12, 24]})
    with pytest.raises(
        UserError, match=r"^--lora .*: is for another model: attention of down_blocks.0 has 8 channels in it, 12 in "
    ):
        main([*flags, "--pretrained_model_name_or_path", str(wider), "--lora", str(lora_dir)])


def test_flags_override_the_adapters_settings(flags, lora_dir, tmp_path, capsys):
    main([*flags, "--lora", str(lora_dir), "--scheduler", "DDIMScheduler", "--num_inference_steps", "3"])
    out = capsys.readouterr().out
    assert "--guidance_scale 1, as the name" in out
    assert out.count("WARNING: --scheduler DDIMScheduler: known to draw noise") == 1
    settings = json.loads((tmp_path / "set/generation_config.json").read_text())["settings"]
    assert settings == settings | {"scheduler": "DDIMScheduler", "num_inference_steps": 3, "scheduler_config": None}


def test_an_adapter_can_bring_its_own_sampling_settings(tiny_pipeline_dir, flags, tmp_path, capsys):
    folder = save_lora(tiny_pipeline_dir, tmp_path / "mine")
    own = {"scheduler": "DDIMScheduler", "num_inference_steps": 3, "scheduler_config": {"timestep_spacing": "leading"}}
    (folder / "sampling.json").write_text(json.dumps(own))
    main([*flags, "--lora", str(folder)])
    assert "--num_inference_steps 3 --guidance_scale 1, as its sampling.json says." in capsys.readouterr().out
    settings = json.loads((tmp_path / "set/generation_config.json").read_text())["settings"]
    assert settings["scheduler_config"] == {"timestep_spacing": "leading"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "cannot be read as JSON"),
        (
            '{"steps": 3}',
            "must be a mapping with keys among scheduler, num_inference_steps, guidance_scale, sch",
        ),
        ("[1]", "must be a mapping"),
        ('{"num_inference_steps": "four"}', "num_inference_steps must be a whole number above 0, got 'four'"),
        ('{"num_inference_steps": 2.5}', "num_inference_steps must be a whole number above 0, got 2.5"),
        ('{"num_inference_steps": true}', "num_inference_steps must be a whole number above 0, got True"),
        ('{"num_inference_steps": -1}', "num_inference_steps must be a whole number above 0, got -1"),
        ('{"guidance_scale": "high"}', "guidance_scale must be a number, 0 or above, or null, got 'high'"),
        ('{"guidance_scale": -3}', "guidance_scale must be a number, 0 or above, or null, got -3"),
        ('{"guidance_scale": NaN}', "guidance_scale must be a number, 0 or above, or null, got nan"),
        ('{"scheduler_config": "x"}', "scheduler_config must be a mapping, got 'x'"),
        ('{"scheduler": "FooScheduler"}', "wants --scheduler FooScheduler: does not fit"),
        ('{"scheduler": "DDIMScheduler", "scheduler_config": {"timestep_spacing": "sideways"}}', "which does not work"),
        (
            '{"scheduler": "LCMScheduler", "num_inference_steps": 5000}',
            "wants --num_inference_steps 5000: does not work",
        ),
    ],
)
def test_a_bad_sampling_file_is_one_line_before_a_model_loads(values, message, lora_dir, flags, tmp_path, monkeypatch):
    from diffusers import AutoPipelineForText2Image

    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    (lora_dir / "sampling.json").write_text(values)
    with pytest.raises(UserError, match=f"^--lora .*lcm-lora: .*{re.escape(message)}"):
        main([*flags, "--lora", str(lora_dir)])
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("scale", ["0", "-1", "abc", "", "nan"])
def test_a_wrong_adapter_scale_is_an_error(scale, lora_dir):
    with pytest.raises(UserError, match="the scale after the colon must be a number above 0, such as .*lcm-lora:0.8"):
        open_lora(f"{lora_dir}:{scale}", None, None)


def test_an_adapter_of_a_repository_is_pinned_and_named_by_file(lora_dir, tiny_pipeline_dir, local_hub):
    shutil.copy(lora_dir / WEIGHTS, lora_dir / "Hyper-SD15-2steps-lora.safetensors")
    commit = publish(local_hub, "user/loras", lora_dir)
    lora = open_lora("user/loras/Hyper-SD15-2steps-lora.safetensors:0.9", None, None)
    assert (lora.source.name, lora.source.revision, lora.scale) == ("user/loras", commit, 0.9)
    assert (lora.filename, lora.few_steps.num_inference_steps) == ("Hyper-SD15-2steps-lora.safetensors", 2)
    assert open_lora("user/loras", None, None).filename == WEIGHTS
    (lora_dir / WEIGHTS).rename(lora_dir / "a.safetensors")
    with pytest.raises(UserError, match="has 2 weight files .*; name one, as in --lora "):
        open_lora(str(lora_dir), None, None)


def test_an_unusable_adapter_is_an_error_before_a_model_loads(
    lora_dir, flags, tiny_xl_pipeline_dir, tmp_path, monkeypatch
):
    from diffusers import AutoPipelineForText2Image

    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    other = save_lora(tiny_xl_pipeline_dir, tmp_path / "xl")
    (pickled := tmp_path / "pickled").mkdir()
    (pickled / "pytorch_lora_weights.bin").write_bytes(b"x")
    (empty := tmp_path / "empty").mkdir()
    (torn := tmp_path / "torn").mkdir()
    (torn / WEIGHTS).write_bytes((lora_dir / WEIGHTS).read_bytes()[:100])
    (model := tmp_path / "model").mkdir()
    save_file({"unet.weight": torch.zeros(2, 2)}, model / WEIGHTS)
    for value, message in (
        (str(other), "with text embeddings of 40 numbers, those of .* have 16; choose an adapter"),
        (str(pickled), "has only pickled weights"), (str(empty), "has no .safetensors file"),
        (str(torn), "cannot be read as safetensors"), (str(model), "has no weights of a LoRA adapter"),
        ("no such thing", "neither an existing folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^--lora .*{message}"):
            main([*flags, "--lora", value])
    with pytest.raises(UserError, match="--lora_revision main: does nothing without --lora"):
        main([*flags, "--lora_revision", "main"])
    assert not (tmp_path / "set").exists()


def change_weights(path, change) -> None:
    weights = load_file(path)
    save_file(weights | {name: change(value.clone()) for name, value in list(weights.items())[:1]}, path)


def with_nan(value: torch.Tensor) -> torch.Tensor:
    value.view(-1)[-1] = torch.nan
    return value


@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_an_adapter_with_a_nan_weight_is_found_before_a_model_loads(number, lora_dir, flags, tmp_path, monkeypatch):
    from diffusers import AutoPipelineForText2Image

    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    change_weights(lora_dir / WEIGHTS, lambda value: with_nan(value).nan_to_num(number))
    with pytest.raises(UserError, match=r"^--lora .*lcm-lora/\S+: has NaN or infinite weights \(unet\..*\): the"):
        main([*flags, "--lora", str(lora_dir)])
    assert not (tmp_path / "set").exists()


def test_nan_weights_are_found_before_an_image_is_drawn(
    lora_dir, flags, copy_pipeline, real_images_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(Sampler, "draw", lambda *_: pytest.fail("drew an image"))
    # finite, but not with this scale
    with pytest.raises(UserError, match=r"^--lora \S+lcm-lora:1e\+38: with it the unet has NaN or infinite"):
        main([*flags, "--lora", f"{lora_dir}:1e38"])
    broken = copy_pipeline()
    change_weights(broken / "vae/diffusion_pytorch_model.safetensors", with_nan)
    with pytest.raises(
        UserError, match="^--pretrained_model_name_or_path .*: its vae has NaN or infinite weights in float32"
    ):
        main([*flags, "--pretrained_model_name_or_path", str(broken)])
    token = save_token(tmp_path / "style", flags[1], real_images_dir)
    change_weights(token / "learned_embeds.safetensors", with_nan)
    with pytest.raises(UserError, match="^--learned_embeds .*style: has NaN or infinite embeddings"):
        main(["--learned_embeds", str(token), *flags[4:]])


def test_an_adapter_of_another_architecture_gives_only_our_line(lora_dir, flags):
    weights = load_file(lora_dir / WEIGHTS)
    others = {name: torch.zeros(2, 7) for name in weights if "to_v.lora_A" in name}
    save_file(weights | others, lora_dir / WEIGHTS)
    said = []
    (handler := logging.Handler()).emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    for library in loggers:
        library.addHandler(handler)
    try:
        with pytest.raises(UserError, match="^--lora .*pytorch_lora_weights.safetensors does not fit a StableDiff"):
            main([*flags, "--lora", str(lora_dir)])
    finally:
        for library in loggers:
            library.removeHandler(handler)
    assert said == []


def test_layers_that_a_file_of_mixed_names_leaves_out_are_counted(lora_dir, flags, caplog, recwarn):
    def renamed(name: str) -> str:
        return name.replace("lora_A", "lora.down").replace("lora_B", "lora.up") if "to_q" in name else name

    save_file({renamed(name): value for name, value in load_file(lora_dir / WEIGHTS).items()}, lora_dir / WEIGHTS)
    num_layers = sum("to_q.lora.down" in name for name in load_file(lora_dir / WEIGHTS))
    main([*flags, "--lora", str(lora_dir)])
    (line,) = {record.getMessage() for record in caplog.records if "--lora" in record.getMessage()}
    assert f": left out of {num_layers} layers (" in line
    assert not any("PEFT" in str(warning.message) for warning in recwarn)


@pytest.mark.soak  # shorter tests pin an adapter of a repository, and fuse a local one, in one process
def test_an_adapter_of_the_hub_is_fused_in_every_process_of_a_launch(
    lora_dir, flags, local_hub, run_with_hub, tmp_path
):
    commit = publish(local_hub, "user/loras", lora_dir)
    flags = [*flags, "--images_per_shard", "2", "--lora", "user/loras"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0",
              "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    done = run_with_hub([*launch, "generate_synthetic.py", *flags], check=True, ACCELERATE_USE_CPU="true")
    settings = json.loads((tmp_path / "set/generation_config.json").read_text())["settings"]
    assert settings["lora"] == "user/loras" and settings["lora_revision"] == commit
    assert "as the name user/loras says" not in done.stdout  # which says nothing about few steps
    hashes = shard_hashes(tmp_path / "set")
    assert len(hashes) == 2
    main([*flags, "--output_dir", str(tmp_path / "alone")])
    assert shard_hashes(tmp_path / "alone") == hashes
