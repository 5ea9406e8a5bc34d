"""README and the other texts: every command parses, every flag exists, every link and picture is there."""

import re
from pathlib import Path

import pytest

from tests.command_lines import SCRIPTS, parse_flags, split_command

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "demo/README.md")]
TEXTS += sorted((ROOT / "docs").glob("*.md"))
# of accelerate, pip and other programs
FOREIGN_FLAGS = {"--multi_gpu", "--num_processes", "--machine_rank", "--config_file"}


def commands_in(text: str) -> list[str]:
    """Return the commands of our scripts: lines of code blocks (joined where they go on) and spans of code."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return [command for command in lines + spans if re.search(r"(launch|python) .*\w\.py( |$)", command)]


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch):
    """Stand where `recipe.yaml`, an example's file, exists, and the recipes do."""
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_of_a_text_parses(path, in_a_copy):
    commands = commands_in(path.read_text(encoding="utf-8"))
    for command in commands:
        if not any(script in command for script in SCRIPTS):
            assert (ROOT / re.search(r"[\w/]+\.py", command).group()).is_file()
            continue
        script, flags = split_command(command.removesuffix("..."))
        parse_flags(script, flags)
    assert commands or path.name == "CONTRIBUTING.md"


def flags_of(script: str) -> set[str]:
    """Return the flags in a script's `--help`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        printed = []
        patch.setattr(
            "argparse.ArgumentParser._print_message", lambda parser, message, file=None: printed.append(message)
        )
        SCRIPTS[script].main(["--help"])
    assert ended.value.code == 0
    return set(re.findall(r"--\w+", "".join(printed)))


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    return set().union(*(flags_of(script) for script in SCRIPTS)) | FOREIGN_FLAGS


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_flag_in_a_text_exists(path, known_flags):
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", path.read_text(encoding="utf-8"))
    ours = [span for span in spans if ".py" not in span or any(script in span for script in SCRIPTS)]
    flags = {flag for span in ours for flag in re.findall(r"(?<![\w-])--[a-z]\w+", span)}
    assert flags <= known_flags


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_and_picture_is_there(path):
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_make_target_in_a_text_exists(path):
    text = path.read_text(encoding="utf-8")
    code = re.findall(r"```(.*?)```", text, re.DOTALL) + re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
    targets = {target for piece in code for target in re.findall(r"\bmake\s+([a-z-]+)", piece)}
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known
