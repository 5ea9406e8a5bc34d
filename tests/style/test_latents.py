import copy
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from filelock import FileLock
from safetensors.torch import load, save

from tests.processes import ForkedPython
from utils.cli.errors import UserError
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images
from utils.style import latents as latents_module
from utils.style.latents import LatentCache, latent_key

NUM_IMAGES, IMAGES_PER_SHARD, BATCH_SIZE = 20, 8, 3
SHARDS = ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"]

# the first lines of every child process
CHILD = f"""
import os, re, sys, time
import torch
from pathlib import Path
from datasets import load_from_disk
from diffusers import AutoencoderKL
from utils.style import latents

latents.IMAGES_PER_SHARD, latents.BATCH_SIZE = {IMAGES_PER_SHARD}, {BATCH_SIZE}
cache_dir, images_dir, vae_dir = sys.argv[1:]
vae, images = AutoencoderKL.from_pretrained(vae_dir), load_from_disk(images_dir)
cache = latents.LatentCache(cache_dir, [str(row) for row in range(len(images))], 32, "tiny", 2)
"""


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents_module, "IMAGES_PER_SHARD", IMAGES_PER_SHARD)
        patch.setattr(latents_module, "BATCH_SIZE", BATCH_SIZE)
        yield


@pytest.fixture(scope="module")
def images(real_images_dir):
    return load_real_images(RealImagesRecord(str(real_images_dir))).train.select(range(NUM_IMAGES))


@pytest.fixture(scope="module")
def vae(tiny_pipeline_dir):
    return AutoencoderKL.from_pretrained(tiny_pipeline_dir, subfolder="vae")


@pytest.fixture(scope="module")
def whole_cache(vae, images, tmp_path_factory):
    """A cache written by one process without interruption."""
    cache = make_cache(tmp_path_factory.mktemp("whole"))
    encode_missing(cache, vae, images)
    return cache


@pytest.fixture
def start_child(tmp_path, tiny_pipeline_dir, images):
    """A function that starts a Python process with a cache in `tmp_path`; it is killed at the end of the test."""
    children = []

    def start(program: str) -> ForkedPython:
        images.save_to_disk(tmp_path / f"images-{len(children)}")
        places = [tmp_path / "cache", tmp_path / f"images-{len(children)}", tiny_pipeline_dir / "vae"]
        child = tmp_path / f"child-{len(children)}.py"
        child.write_text(CHILD + program)
        children.append(ForkedPython([child, *places], tmp_path, os.environ))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def make_cache(cache_dir, vae_identity="tiny") -> LatentCache:
    return LatentCache(cache_dir, [str(row) for row in range(NUM_IMAGES)], 32, vae_identity, 2)


def encode_missing(cache, vae, images, rank=0, num_parts=1, show_progress=False):
    cache.encode(vae, images, cache.missing_shards(rank, num_parts), show_progress)


def copy_cache(cache, cache_dir) -> LatentCache:
    shutil.copytree(cache.folder.parent, cache_dir)
    return make_cache(cache_dir)


def read_shards(cache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.folder.glob("*.safetensors"))}


def temporaries(cache) -> list[str]:
    return [path.name for path in cache.folder.iterdir() if path.suffix == ".tmp"]


def wait_for(path: Path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.01)


@torch.no_grad()
def test_latents_of_every_image_and_copy_are_what_the_vae_gives(whole_cache, vae, images):
    latents, indices, noise = whole_cache.open(), torch.arange(NUM_IMAGES).flip(0), torch.randn(NUM_IMAGES, 4, 16, 16)
    assert (latents.num_copies, latents.latent_shape) == (2, (4, 16, 16))
    pixels = np.stack([np.asarray(images[row]["image"], dtype=np.float32) for row in indices.tolist()]) / 127.5 - 1
    for copy_index, view in enumerate((pixels, pixels[:, :, ::-1])):  # mirrored rows of pixels
        posterior = vae.encode(torch.from_numpy(view.transpose(0, 3, 1, 2).copy())).latent_dist
        drawn = latents.sample(indices, torch.full((NUM_IMAGES,), copy_index), noise)
        assert drawn.dtype == torch.float32
        torch.testing.assert_close(drawn, posterior.mean + posterior.std * noise, rtol=1e-3, atol=1e-3)
        if copy_index == 0:
            torch.testing.assert_close(latents.mean(indices), posterior.mean, rtol=1e-3, atol=1e-3)
    assert not torch.equal(latents.sample(indices, torch.zeros(NUM_IMAGES).long(), noise), drawn)


@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_any_number_of_processes_writes_and_reads_the_same_bytes(whole_cache, vae, images, tmp_path, caplog, num_parts):
    cache = make_cache(tmp_path)
    for rank in reversed(range(num_parts)):
        encode_missing(cache, vae, images, rank, num_parts)
    assert list(read_shards(cache)) == SHARDS
    assert read_shards(cache) == read_shards(whole_cache)
    again = make_cache(tmp_path)
    assert [again.missing_shards(rank, 4) for rank in range(4)] == [[]] * 4
    again.encode(None, images, [0, 1, 2], show_progress=False)  # as if another run was faster
    assert caplog.text == ""  # absent is not damaged


def test_each_process_has_its_own_part_of_the_missing_shards(tmp_path):
    cache = LatentCache(tmp_path, [str(row) for row in range(7 * IMAGES_PER_SHARD)], 32, "tiny", 2)
    assert [cache.missing_shards(rank, 3) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def flip_bit(contents: bytes, place: int) -> bytes:
    changed = bytearray(contents)
    changed[place] ^= 1
    return bytes(changed)


def with_tensors(contents: bytes, change) -> bytes:
    """Return a shard with changed tensors under the old hash."""
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    return save({name: change(value).contiguous() for name, value in load(contents).items()}, header["__metadata__"])


DAMAGES = {
    "empty": lambda contents: b"",
    "cut in the header": lambda contents: contents[:100],
    "cut by a byte": lambda contents: contents[:-1],
    "longer": lambda contents: contents + b"\0",
    "a bit of the hash": lambda contents: flip_bit(contents, 8 + contents[8:].index(b'sha256":"') + 12),
    "a bit of a name": lambda contents: flip_bit(contents, contents.index(b"mean")),
    "a bit of a mean": lambda contents: flip_bit(contents, -30_000),
    "a bit of the last number": lambda contents: flip_bit(contents, -2),
    "no hash": lambda contents: save(load(contents)),
    "other shape": lambda contents: with_tensors(contents, lambda value: value.reshape(2, 8, 4, 8, 32)),
    "fewer images": lambda contents: with_tensors(contents, lambda value: value[:, :-1]),
    "other type": lambda contents: with_tensors(contents, lambda value: value.bfloat16()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_encoded_again(whole_cache, vae, images, tmp_path, caplog, damage):
    cache = copy_cache(whole_cache, tmp_path / "copy")
    path = cache.folder / SHARDS[1]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert cache.missing_shards() == [1]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: damaged; its images are encoded again."]
    encode_missing(cache, vae, images)
    assert read_shards(cache) == read_shards(whole_cache)


def test_a_misplaced_shard_counts_as_damaged(whole_cache, tmp_path):
    cache = copy_cache(whole_cache, tmp_path / "copy")
    shutil.copy(cache.folder / SHARDS[0], cache.folder / SHARDS[1])
    other_vae = make_cache(tmp_path / "copy", "other")
    shutil.copytree(whole_cache.folder, other_vae.folder)
    assert cache.missing_shards() == [1]
    assert other_vae.missing_shards() == [0, 1, 2]


def test_opened_latents_survive_pickling_without_their_data_and_a_missing_shard_is_named(whole_cache, tmp_path):
    latents, indices = whole_cache.open(), torch.arange(NUM_IMAGES)
    pickled = pickle.dumps(latents)
    assert len(pickled) < 2_000
    assert torch.equal(pickle.loads(pickled).mean(indices), latents.mean(indices))
    cache = copy_cache(whole_cache, tmp_path / "copy")
    (cache.folder / SHARDS[2]).unlink()
    with pytest.raises(RuntimeError, match=f"a shard is missing.*{SHARDS[2]}"):
        cache.open()


def test_the_key_depends_on_everything_that_decides_the_latents(monkeypatch):
    settings = {"image_digests": ["a", "b"], "resolution": 32, "vae_identity": "tiny", "num_copies": 2}
    others = [
        {"image_digests": ["a", "c"]}, {"image_digests": ["b", "a"]}, {"image_digests": ["a"]},
        {"resolution": 64}, {"vae_identity": "tiny2"}, {"num_copies": 1},
    ]  # fmt: skip
    keys = [latent_key(**settings | other) for other in ({}, *others)]
    for constant in ("FORMAT_VERSION", "IMAGES_PER_SHARD"):
        monkeypatch.setattr(latents_module, constant, 99)
        keys.append(latent_key(**settings))
    assert len(set(keys)) == len(keys) == 9
    assert latent_key(**settings) == keys[-1]


def test_progress_counts_images_and_the_folder_has_a_description(vae, images, tmp_path, capsys):
    cache = make_cache(tmp_path)
    encode_missing(cache, vae, images, show_progress=True)
    progress = capsys.readouterr().err
    assert "encoding images: 100%" in progress
    assert f"{NUM_IMAGES}/{NUM_IMAGES}" in progress
    facts = {"num_images": NUM_IMAGES, "num_copies": 2, "resolution": 32, "vae_identity": "tiny"}
    assert json.loads((cache.folder / "latents.json").read_text()) == facts


def test_an_unwritable_cache_is_one_line_and_leaves_no_partial_files(whole_cache, vae, images, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--latent_cache_dir .*/file: cannot be written"):
        encode_missing(make_cache(tmp_path / "file"), vae, images)
    broken = copy.deepcopy(vae)
    broken.quant_conv.bias.data[0] = torch.nan
    cache = make_cache(tmp_path)
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: .* not finite"):
        encode_missing(cache, broken, images)

    def fill(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        with pytest.raises(UserError, match=rf"^--latent_cache_dir {tmp_path}: .*No space left on device.*space"):
            encode_missing(cache, vae, images)
    assert read_shards(cache) == {}
    assert temporaries(cache) == []
    encode_missing(cache, vae, images)
    assert read_shards(cache) == read_shards(whole_cache)


@pytest.mark.parametrize("other_run_dies", [False, True])
def test_a_shard_that_another_run_holds_is_left_to_it_unless_it_dies(
    whole_cache, vae, images, tmp_path, other_run_dies
):
    cache = make_cache(tmp_path)
    cache.folder.mkdir()
    path = cache.folder / SHARDS[0]
    with ThreadPoolExecutor() as pool:
        with FileLock(cache.folder / ".shard-00000.lock"):
            run = pool.submit(encode_missing, cache, vae, images)
            wait_for(cache.folder / SHARDS[2])
            assert not path.exists()
            if not other_run_dies:
                shutil.copy(whole_cache.folder / SHARDS[0], path)
                written_by_other = path.stat().st_ino
        run.result(timeout=300)
    assert read_shards(cache) == read_shards(whole_cache)
    if not other_run_dies:
        assert path.stat().st_ino == written_by_other


def test_a_killed_run_leaves_whole_shards_and_the_next_one_finishes(whole_cache, vae, images, tmp_path, start_child):
    child = start_child("""
def hang(descriptor):
    if list(cache.folder.glob("*.safetensors")):
        print("in the middle of the second shard", flush=True)
        time.sleep(600)

os.fsync = hang
cache.encode(vae, images, cache.missing_shards(), show_progress=False)
""")
    assert child.readline() == "in the middle of the second shard\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    cache = make_cache(tmp_path / "cache")
    assert list(read_shards(cache)) == SHARDS[:1]
    assert len(temporaries(cache)) == 1
    assert cache.missing_shards() == [1, 2]
    on_another_machine = cache.folder / ".shard-00001.another-machine.1.tmp"  # may be in use right now
    on_another_machine.touch()
    encode_missing(cache, vae, images)
    assert read_shards(cache) == read_shards(whole_cache)
    assert temporaries(cache) == [on_another_machine.name]


def test_two_runs_that_start_together_share_the_work(whole_cache, tmp_path, start_child):
    program = """
replace = os.replace

def report_and_replace(temporary, path):
    print(path.name, flush=True)
    replace(temporary, path)

os.replace = report_and_replace
print("ready", flush=True)
while not Path(cache_dir).with_name("go").exists():
    time.sleep(0.01)
cache.encode(vae, images, cache.missing_shards(), show_progress=False)
assert len(cache.open().mean(torch.arange(len(images)))) == len(images)
"""
    children = [start_child(program) for _ in range(2)]
    assert [child.readline() for child in children] == ["ready\n"] * 2
    (tmp_path / "go").touch()
    encoded = [name for child in children for name in child.communicate()[0].split() if name != "ready"]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(encoded) == SHARDS  # each by one of them
    cache = make_cache(tmp_path / "cache")
    assert read_shards(cache) == read_shards(whole_cache)
    assert temporaries(cache) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_memory_does_not_grow_with_the_number_of_images(images, tmp_path):
    AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, mid_block_add_attention=False,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    images.save_to_disk(tmp_path / "images")
    program = """
latents.IMAGES_PER_SHARD, latents.BATCH_SIZE = 128, 16

def measure(num_images, hold=None):
    \"\"\"Return the peak of anonymous memory, in MiB, of encoding and sampling; `hold` takes what the VAE gives.\"\"\"
    peak = 0
    def look(*_):
        nonlocal peak
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]) / 1024)
    def look_and_hold(module, inputs, output):
        look()
        if hold is not None:
            hold.append(output.clone())
    hook = vae.encoder.register_forward_hook(look_and_hold)
    cache = latents.LatentCache(cache_dir, [f"{num_images} {hold}"] * num_images, 32, "tiny", 2)
    cache.encode(vae, images.select([0] * num_images), cache.missing_shards(), show_progress=False)
    opened = cache.open()
    for indices in torch.arange(num_images).split(64):
        opened.sample(indices, indices % 2, torch.zeros(len(indices), *opened.latent_shape))
        look()
    hook.remove()
    return peak

print(measure(500), measure(4_000), measure(2_000, hold=[]))
"""
    # a new process, as a forked one inherits memory
    places = [tmp_path / "cache", tmp_path / "images", tmp_path / "vae"]
    done = subprocess.run([sys.executable, "-c", CHILD + program, *places], stdout=subprocess.PIPE, check=True)
    small, large, held = map(float, done.stdout.split())
    # the latents of 4,000 images take 31 MiB, as do the VAE's outputs for 2,000
    assert large - small < 8
    assert held - small > 25  # so it would be seen
