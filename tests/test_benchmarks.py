"""The tools of the benchmarks."""

import os
import re
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

import train_dsi
from benchmarks import generate_overhead, generate_scan, generate_speed, memory_count, peer_loop, report
from benchmarks.children import Child, Tick, read_bars, run_child
from benchmarks.commands import environment_of, our_command
from benchmarks.drawing import DRAWING_BAR, NOUNS, Case, demo_case, quick_case
from benchmarks.generate_speed import Program, Run
from benchmarks.pipelines import QUICK, SCALED, SD15, drawing_cost
from utils.style.base_models import open_base_model
from utils.style.forecast import DsiRun, build_encoder, build_unet, count_training
from utils.synthesis.shards import Shards

BAR = """
import sys, time
from tqdm import tqdm
held = bytearray(200 * 2**20)
for _ in tqdm(range(20), desc="style token", mininterval=0):
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Four images of each of ten classes, in batches of two."""
    return quick_case(4, tmp_path_factory.mktemp("quick"))


def test_a_childs_bar_and_memory_are_recorded(tmp_path):
    child = run_child([sys.executable, "-c", BAR], tmp_path / "log", {})
    assert [tick.done for tick in child.bars["style token", 20]][:21] == list(range(21))
    assert child.seconds > 1
    assert 200 < child.peaks["RssAnon"] < 400
    assert "style token" in (tmp_path / "log").read_text()
    assert 0 < child.seconds_of("style token", 20) < child.seconds


def test_an_update_of_a_bar_has_the_time_when_it_was_drawn(tmp_path):
    """Each update is written after the last one was read, so its time lies between the two."""
    reading, writing = os.pipe()
    bars, drawn, started = {}, [], time.perf_counter()
    reader = threading.Thread(target=read_bars, args=(reading, tmp_path / "log", started, bars))
    reader.start()
    for done in range(21):
        drawn.append(time.perf_counter() - started)
        os.write(writing, f"\rstyle token: {5 * done:3d}%|#   | {done}/20 [00:01<00:01]".encode())
        while len(bars.get(("style token", 20), [])) <= done:
            time.sleep(0.001)
    os.close(writing)
    reader.join()
    ticks = bars["style token", 20]
    assert [tick.done for tick in ticks] == list(range(21))
    for tick, before, after in zip(ticks, drawn, [*drawn[1:], time.perf_counter()]):
        assert before <= tick.seconds <= after


def test_a_childs_speed_is_that_of_its_bar():
    ticks = [Tick(2.0 + done / 20, done) for done in (*range(21), 20)]
    child = Child(5.0, {}, {("style token", 20): ticks})
    assert child.units_per_second("style token", 20, 5, 15) == pytest.approx(20)
    assert child.units_per_second("style token", 20) == pytest.approx(20)
    assert child.seconds_of("style token", 20) == pytest.approx(1)


def test_a_child_that_fails_is_an_error_with_its_output(tmp_path):
    with pytest.raises(RuntimeError, match="exit status 3\nwhy"):
        run_child([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path / "log", {})


def test_the_scaled_pipelines_vae_has_the_share_of_stable_diffusions():
    cost = SD15.cost()
    assert SCALED.cost().vae_share == pytest.approx(cost.vae_share, rel=0.03)
    assert cost.unet == pytest.approx(1.67e12, rel=0.01)  # counted independently
    assert cost.vae_encode == pytest.approx(1.12e12, rel=0.01)


def test_an_image_of_stable_diffusions_size_costs_what_was_counted(tmp_path):
    """Counted independently: 42.7 TFLOP, of which the VAE has 2.51, once per image."""
    for name, build in (("unet", SD15.build_unet), ("vae", SD15.build_vae)):
        with torch.device("meta"):
            build().save_config(tmp_path / name)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"max_position_embeddings": 77}')
    assert drawing_cost(tmp_path, 25, 3.0) == pytest.approx(42.7e12, rel=0.01)
    assert drawing_cost(tmp_path, 25, 1.0) == pytest.approx((42.7e12 - 2.51e12) / 2 + 2.51e12, rel=0.01)


@pytest.mark.parametrize(("name", "sizes"), memory_count.NUM_PARAMETERS.items())
def test_the_base_models_whose_memory_is_counted_have_their_published_sizes(name, sizes, tmp_path):
    """Numbers of weights of the U-Net and of the text encoders, without the token's row in each."""
    base_model = memory_count.write_configs(name, tmp_path / "model")
    run = DsiRun(512, 1, torch.float32)
    with torch.device("meta"):
        unet, encoder = build_unet(base_model, run.dtype), build_encoder(base_model, run)
    counted = [unet, *encoder.text_encoders]
    rows = [0, *(style_token.rows.numel() for style_token in encoder.style_tokens)]
    assert [model.num_parameters() - row for model, row in zip(counted, rows, strict=True)] == sizes


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_each_image_of_a_batch_adds_as_much_memory(is_checkpointed, tiny_xl_pipeline_dir):
    base_model = open_base_model(str(tiny_xl_pipeline_dir), "--pretrained_model_name_or_path")
    first, second, fifth = (
        count_training(base_model, DsiRun(32, number, torch.bfloat16), is_checkpointed, train_dsi.denoising_loss)
        for number in (1, 2, 5)
    )
    counted = memory_count.at_batch(first, second, 5)
    assert counted.activations == pytest.approx(fifth.activations, rel=0.01)
    assert fifth.activations > 3 * first.activations


def test_a_section_replaces_its_earlier_version_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    for title, body in (("Speed", "old"), ("Memory", "flat"), ("Speed", "new")):
        report.write_section("train_dsi", title, body)
    report.write_section("generate_synthetic", "Speed", "other")
    text = (tmp_path / "train_dsi.md").read_text()
    assert text.startswith("# Speed and memory of train_dsi.py\n")
    assert text.index("## Speed\n\nnew\n") < text.index("## Memory\n\nflat\n")
    assert "old" not in text and "other" not in text
    assert text.count("torch ") == 2
    other = (tmp_path / "generate_synthetic.md").read_text()
    assert other.startswith("# Speed and memory of generate_synthetic.py\n")
    assert "## Speed\n\nother\n" in other


def test_the_command_is_one_that_the_script_takes(tmp_path):
    (tmp_path / "train.parquet").touch()
    groups = train_dsi.parse_arguments(our_command(tmp_path, tmp_path, tmp_path, max_train_steps=3)[2:])
    templates = train_dsi.read_templates(groups[2])
    assert len(templates) == 1


def test_the_loop_draws_the_same_number_of_images_into_class_folders(case, tmp_path):
    peer_loop.main(case.peer_command(tmp_path)[2:])
    for name in NOUNS:
        files = sorted((tmp_path / "loop" / name).iterdir())
        assert [file.name for file in files] == [f"{number:06d}.png" for number in range(4)]
        assert Image.open(files[0]).size == (QUICK.resolution, QUICK.resolution)
        assert len({file.read_bytes() for file in files}) == 4


def test_both_commands_ask_for_the_same_images(tmp_path):
    """Both follow the demo's recipe."""
    case = demo_case(50)
    ours, loop = case.our_command(tmp_path), case.peer_command(tmp_path)
    shared = {"--num_inference_steps=12", "--guidance_scale=1.2", "--batch_size=50", "--num_images_per_class=50"}
    assert shared <= set(ours) and shared <= set(loop)
    # the loop uses the pipeline's scheduler and writes PNG
    assert {"--scheduler=default", "--image_format=png"} <= set(ours)
    assert case.num_images == 500


def test_programs_are_started_as_the_table_names_them(case, tmp_path):
    loop, one, many = generate_speed.programs_on(3)
    assert [program.num_threads for program in (loop, one, many)] == [3, 3, 1]
    assert environment_of(tmp_path, "cpu", 3)["OMP_NUM_THREADS"] == "3"
    assert "peer_loop.py" in loop.command(case, tmp_path)[1]
    assert "launch" not in one.command(case, tmp_path)
    command = many.command(case, tmp_path)
    assert command[command.index("--num_processes") + 1] == "3"
    plain, compiled = (program.command(case, tmp_path) for program in generate_speed.COMPILING)
    assert set(compiled) - set(plain) == {"--torch_compile=True"}


def test_sampling_speed_is_that_between_a_loaded_pipeline_and_the_last_file(case):
    ticks = [
        Tick(7.0, 0),
        Tick(9.0, 1),
        Tick(10.0, 13),
        Tick(14.0, 40),
        Tick(15.0, 40),
    ]  # closed when everything is written
    child = Child(20.0, {"RssAnon": 5.0, "device": 0.0}, {(DRAWING_BAR, 40): ticks})
    run = generate_speed.read_run(child, Program("ours"), case)
    assert (run.start, run.first_batch, run.images_per_second) == (7.0, 2.0, 40 / 8)
    assert run.later_images_per_second == 38 / 6
    two = generate_speed.read_run(child, Program("ours", num_processes=2), case)
    assert two.later_images_per_second == 36 / 6  # without each process's first batch


def make_run(speed: float, first_batch=1.0, later=10.0) -> Run:
    return Run(5.0, first_batch, speed, later, {"RssAnon": 700.0, "device": 0.0})


def test_a_table_compares_each_round_with_the_loop_of_the_same_round():
    loop, ours = [make_run(10), make_run(20), make_run(40)], [make_run(15), make_run(28), make_run(80)]
    row = generate_speed.describe_program(Program("ours"), ours, loop, matrix_share=0.01)
    assert row["images/s"] == "28.0 (15.0 to 80.0)"
    assert row["times the first row's"] == "1.50 (1.40 to 2.00)"
    assert row["of the matrix rate"] == "28%"
    assert row["memory, MiB"] == "700"
    assert "GPU memory, GiB" not in row


def test_compiling_pays_off_when_it_has_saved_what_it_cost():
    plain, compiled = [make_run(9, first_batch=1, later=10)], [make_run(5, first_batch=31, later=20)]
    assert "Compiling takes 30 s" in generate_speed.describe_compiling(plain, compiled)
    assert "pays off after 600 images" in generate_speed.describe_compiling(plain, compiled)  # 60 s, or 30 and 30
    assert "never pays off" in generate_speed.describe_compiling(compiled, plain)


@pytest.mark.soak
def test_a_real_runs_figures_are_read(case):
    run = generate_speed.run_program(Program("ours"), case, "cpu")
    # an eighth of the import of the libraries, about a second on an idle machine
    second = run.start / 8
    assert run.start > 1 and second > run.first_batch > 0
    assert run.images_per_second * second > 1 and run.later_images_per_second * second > 1
    assert run.peaks["RssAnon"] > 200


def test_a_run_by_fewer_processes_than_asked_for_is_an_error():
    """As if `accelerate launch` started processes that do not know of each other."""

    class Alone(Case):
        def our_command(self, *_, **__) -> list[str]:
            return [sys.executable, "-c", BAR]

    with pytest.raises(RuntimeError, match="ours: was run by 1 processes"):
        generate_speed.run_program(Program("ours", num_processes=2), Alone("", "", 2, 1, 1, 1.0), "cpu")


def test_the_overhead_is_what_the_modules_leave_of_the_sampling(case, tmp_path):
    originals = [getattr(kind, method) for kind, method, _ in generate_overhead.TARGETS]
    seconds = generate_overhead.watch_run(replace(case, num_inference_steps=3).our_command(tmp_path), "cpu")
    assert 0 < seconds["VAE"] < seconds["whole"] and seconds["denoiser"] < seconds["whole"]
    assert 0 < generate_overhead.overhead(seconds) < 1
    assert 0 < seconds["work of both"] < seconds["whole work"]
    assert [getattr(kind, method) for kind, method, _ in generate_overhead.TARGETS] == originals


def test_the_overhead_is_a_share_of_the_whole_time():
    seconds = {"denoiser": 3.0, "VAE": 1.0, "whole": 5.0, "work of both": 4.0, "whole work": 8.0}
    assert generate_overhead.overhead(seconds) == pytest.approx(0.2)
    assert generate_overhead.describe_run(1, seconds, "cpu")["neither, of the work"] == "50.0%"
    assert "neither, of the work" not in generate_overhead.describe_run(1, seconds, "cuda")


def test_a_watch_adds_up_calls():
    clock = iter([1.0, 3.0, 10.0, 14.0])
    watch = generate_overhead.Watch(lambda: next(clock))
    assert [watch.wrap(abs)(number) for number in (-5, -6)] == [5, 6]
    assert watch.seconds == 6


def test_a_restart_is_measured_on_finished_shards_with_known_checksums_or_hashed_again(tmp_path):
    noted, hashed, num_bytes = generate_scan.measure(tmp_path, num_images=2_000, num_shards=10, image_bytes=20_000)
    assert 40e6 < num_bytes < 42e6
    assert 0 < noted < hashed
    *_, usual = generate_scan.make_rows(2_000, noted, 4.0, num_bytes)
    assert usual["seconds"] == "10"  # for 50 kB instead of 20


def test_a_restart_that_lacks_shards_is_not_taken_for_a_fast_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "write_checksums", lambda _: None)  # without the notes, no shard is known
    with pytest.raises(RuntimeError, match="2 shards are missing"):
        generate_scan.measure(tmp_path, num_images=400, num_shards=2, image_bytes=10)


def test_the_plan_of_many_images_takes_no_more_memory_than_that_of_few():
    kib = [
        float(re.search(r"at most ([\d,]+) KiB", generate_scan.describe_plan(num_images, 2_000))[1].replace(",", ""))
        for num_images in (60_000, 600_000)
    ]
    assert kib[1] < kib[0] + 20 and kib[1] < 1_000
