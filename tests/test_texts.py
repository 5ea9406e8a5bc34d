"""README and the other texts: every command parses, every flag, link and picture exists."""

import ast
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from docs.build_reference import REFERENCE, build
from tests.command_lines import SCRIPTS, parse_flags, split_command

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "demo/README.md")]
TEXTS += sorted((ROOT / "docs").glob("*.md"))
# of accelerate, pip and other programs
FOREIGN_FLAGS = {
    "--multi_gpu", "--num_processes", "--machine_rank", "--config_file", "--cpu", "--num_cpu_threads_per_process",
    "--flavor", "--timeout", "--secrets", "--volume",
}  # fmt: skip
WHERE, TROUBLE = ROOT / "docs" / "where_it_runs.md", ROOT / "docs" / "troubleshooting.md"
SLURM = ROOT / "recipes" / "slurm.sbatch"

of_every_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def code_in(path: Path, language: str = "") -> tuple[list[str], list[str]]:
    """Return a text's code blocks, of a given language if any, and its code spans."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}(.*?)```", text, re.DOTALL)
    return blocks, re.findall(r"(?<!`)`([^`]+)`(?!`)", text)


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch):
    """Stand where `recipe.yaml`, an example's file, exists, and the recipes do; as if there was a GPU with bfloat16."""
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


def lines_of_blocks(path: Path) -> list[str]:
    """Return the lines of a text's blocks of commands, joined where they continue."""
    return [line.strip() for block in code_in(path, "bash\n")[0] for line in block.replace("\\\n", " ").splitlines()]


def commands_of_job(line: str) -> list[str]:
    """Return the commands that a Hugging Face Job runs; of any other line, the line itself."""
    return re.split(r"\s*&&\s*", shlex.split(line)[-1]) if line.startswith("hf jobs run") else [line]


def parse_launch(command: str) -> Namespace:
    """Return what `accelerate launch` understands of a command; its own flags come before the script."""
    words = shlex.split(command, comments=True)
    launch = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
    assert launch.training_script in SCRIPTS
    assert launch.config_file is None or (ROOT / launch.config_file).is_file()
    return launch


@of_every_text
def test_every_command_of_a_text_parses(path, in_a_copy):
    """Commands are lines of code blocks, joined where they continue, and spans of code."""
    lines = [command for line in lines_of_blocks(path) for command in commands_of_job(line)]
    lines += [" ".join(span.split()) for span in code_in(path)[1]]
    commands = [line for line in lines if re.search(r"(launch|python|sbatch) .*\w\.py( |$)", line)]
    for command in commands:
        if any(script in command for script in SCRIPTS):
            parse_flags(*split_command(command.removesuffix("...")))
            if "accelerate launch" in command:
                parse_launch(command)
        else:
            assert (ROOT / re.search(r"[\w/]+\.py", command).group()).is_file()
    assert commands or path.name == "CONTRIBUTING.md"


def test_the_command_for_hugging_face_jobs_is_one_that_hf_accepts():
    [job] = [line for line in lines_of_blocks(WHERE) if line.startswith("hf jobs run")]
    command = [Path(sys.executable).with_name("hf"), "jobs", "run", "--dry-run", "--volume", "./photos:/photos"]
    done = subprocess.run(
        [*command, *shlex.split(job)[3:]], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    # an unknown flag is taken for the image
    understood = dict(re.findall(r"^  (\w+) +(.*)$", done.stdout, re.MULTILINE))
    assert (understood["image"], understood["flavor"]) == ("python:3.12", "a10g-large"), done.stderr
    assert sum("accelerate launch" in command for command in commands_of_job(job)) == 3


def test_the_slurm_file_launches_a_script_on_all_machines(in_a_copy, monkeypatch):
    """Stand-ins for Slurm's programs run a task on each of two machines; that of accelerate prints its arguments."""
    assert f"```sh\n{SLURM.read_text()}```" in WHERE.read_text(), "docs/where_it_runs.md shows another slurm.sbatch"
    programs = {
        "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "scontrol": "echo first; echo second",
        "accelerate": "printf '%q ' accelerate \"$@\"; echo",
        ".venv/bin/activate": "",
    }
    for name, text in programs.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"#!/bin/bash\n{text}\n")
        Path(name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path.cwd()}:{os.environ['PATH']}")
    for name, value in {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(name, value)

    flags = ["--train_dir", "my photos", "--output_dir", "cars-style"]
    done = subprocess.run(["bash", SLURM, "train_dsi.py", *flags], capture_output=True, text=True, check=True)

    launches = [parse_launch(line) for line in done.stdout.splitlines()]
    assert [(launch.machine_rank, launch.num_machines, launch.num_processes) for launch in launches] == [
        (0, 2, 16), (1, 2, 16)
    ]  # fmt: skip
    assert {launch.main_process_ip for launch in launches} == {"first"}
    assert all(launch.training_script_args == flags for launch in launches)


def test_the_reference_of_flags_is_up_to_date():
    assert REFERENCE.read_text(encoding="utf-8") == build(), "run `make docs`"


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """The flags in the `--help` of all scripts, and those of other programs."""
    with redirect_stdout(StringIO()) as printed:
        for script in SCRIPTS.values():
            with pytest.raises(SystemExit) as ended:
                script.main(["--help"])
            assert ended.value.code == 0
    return set(re.findall(r"--\w+", printed.getvalue())) | FOREIGN_FLAGS


@of_every_text
def test_every_flag_in_a_text_exists(path, known_flags):
    _, spans = code_in(path)
    ours = [span for span in spans if ".py" not in span or any(script in span for script in SCRIPTS)]
    assert {flag for span in ours for flag in re.findall(r"(?<![\w-])--[a-z]\w+", span)} <= known_flags


@of_every_text
def test_every_link_and_picture_exists(path):
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    ours = [target for target in targets if not target.startswith(("http:", "https:"))]
    assert [target for target in ours if not (path.parent / target).exists()] == []


@of_every_text
def test_every_link_to_a_heading_finds_it(path):
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", path.read_text(encoding="utf-8"))
    pages = {page: (path.parent / page if page else path).read_text(encoding="utf-8") for page, _ in links}
    headings = {page: re.findall(r"^#+ (.*)$", text, re.MULTILINE) for page, text in pages.items()}
    # as GitHub and the Hub name them
    slugs = {
        page: {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in headings[page]} for page in pages
    }
    assert [(page, heading) for page, heading in links if heading not in slugs[page]] == []


@of_every_text
def test_every_make_target_in_a_text_exists(path):
    targets = {target for piece in sum(code_in(path), []) for target in re.findall(r"\bmake\s+([a-z-]+)", piece)}
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def messages_in_code() -> list[str]:
    """Return the texts in the code of the scripts and of `utils/`, adjacent pieces joined and values left out."""
    texts = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_troubleshooting_quotes_messages_as_they_are():
    rows = re.findall(r"^\| (.*?) \|", TROUBLE.read_text(encoding="utf-8"), re.MULTILINE)
    quoted = {quote for row in rows for quote in re.findall(r"`([^`]+)`", row)} - {"Killed", "style.png"}
    texts = messages_in_code()
    assert len(quoted) > 20
    assert {quote for quote in quoted if not any(quote in text for text in texts)} == set()
