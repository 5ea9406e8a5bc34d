"""README and the other texts: every command parses, every flag exists, every link and picture is there."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.command_lines import SCRIPTS, parse_flags, split_command

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "demo/README.md")]
TEXTS += sorted((ROOT / "docs").glob("*.md"))
# of accelerate, pip and other programs
FOREIGN_FLAGS = {
    "--multi_gpu", "--num_processes", "--machine_rank", "--config_file", "--cpu", "--num_cpu_threads_per_process"
}  # fmt: skip

of_every_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def code_in(path: Path, language: str = "") -> tuple[list[str], list[str]]:
    """Return a text's code blocks, those of a language where one is given, and its spans of code."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}(.*?)```", text, re.DOTALL)
    return blocks, re.findall(r"(?<!`)`([^`]+)`(?!`)", text)


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch):
    """Stand where `recipe.yaml`, an example's file, exists, and the recipes do."""
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)


@of_every_text
def test_every_command_of_a_text_parses(path, in_a_copy):
    """Commands are lines of code blocks, joined where they go on, and spans of code."""
    blocks, spans = code_in(path, "bash\n")
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(span.split()) for span in spans]
    commands = [line for line in lines if re.search(r"(launch|python) .*\w\.py( |$)", line)]
    for command in commands:
        if any(script in command for script in SCRIPTS):
            parse_flags(*split_command(command.removesuffix("...")))
        else:
            assert (ROOT / re.search(r"[\w/]+\.py", command).group()).is_file()
    assert commands or path.name == "CONTRIBUTING.md"


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
def test_every_link_and_picture_is_there(path):
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
