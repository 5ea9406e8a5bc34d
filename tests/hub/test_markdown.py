"""Names, prompts and settings with any characters in cards: a Markdown parser reads them unchanged."""

import html
import re

import pytest
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt

from tests.style.test_card import write_style_card
from tests.synthesis.test_card import UNKNOWN, write_set_card
from tests.transfer.test_card import write_classifier_card
from utils.comparison.classifiers import parse_classifiers
from utils.comparison.report import write_markdown
from utils.hub.cards import END, License, code, fence, save_card, text
from utils.synthesis.finishing import quality_section

NAMES = [
    "car|van", "a||b", "back\\slash", "back\\|pipe", "ends in \\", "two\nlines", "tab\tand  blanks", "`tick`", "``",
    "*star*", "_under_ snake_case", "# heading", "#1", "- dash", "1. first", "2) second", "<b>bold</b>", "`",
    "<!-- hidden -->", END,
    "<style>", "[link](https://example.com)", "![picture](x.png)", "&amp; &copy; a & b", "{{ braces }}", "{% if %}",
    "~~gone~~", "$x$", "> quote", "---", "+", "=", "yes", "null", "1", "é ü 日本", "a\u2028b", "'quoted' \"twice\"",
    "| --- |", "http://x.org", ":smile:", "word_ _word", "**", "</code>", "<br>", "a\\\nb",
]  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def one_line(name: str) -> str:
    return " ".join(name.split())


def seen(token) -> str:
    """Return the visible text of an inline token."""
    parts = []
    for child in token.children:
        assert child.type in ("text", "code_inline", "html_inline", "strong_open", "strong_close"), child
        if child.type == "html_inline":
            assert child.content in ("<code>", "</code>", "<br>")
        else:
            parts.append(child.content)
    return "".join(parts)


def tables(markdown: str) -> list[list[list[str]]]:
    """Return the tables of a text, as rows of visible cells."""
    found = []
    cell = False
    for token in PARSER.parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open", "td_close", "th_close"):
            cell = token.type.endswith("open")
        elif token.type == "inline" and cell:
            found[-1][-1].append(seen(token))
    return found


@pytest.mark.parametrize("show", [text, code])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_unchanged_in_every_position(show, name):
    shown = show(name)
    assert tables(f"| a | b | c |\n|---|---|---|\n| x | {shown} | y |") == [
        [["a", "b", "c"], ["x", one_line(name), "y"]]
    ]
    kinds = {"- ": "bullet_list_open", "# ": "heading_open", "": "paragraph_open", "Of ": "paragraph_open"}
    for prefix, kind in kinds.items():
        tokens = PARSER.parse(f"{prefix}{shown}")
        assert tokens[0].type == kind
        (inline,) = [token for token in tokens if token.type == "inline"]
        assert seen(inline) == prefix.removeprefix("- ").removeprefix("# ") + one_line(name)
    assert END not in shown


def test_a_long_name_is_cut():
    assert len(text("x" * 5000)) == len(code("x" * 5000)) - 2 == 200


def test_ordinary_names_stay_readable():
    assert text("apple_pie, 30 % (ripe)") == "apple_pie, 30 % (ripe)"
    assert code("user/cars_2") == "`user/cars_2`"
    assert code("<style>") == "`<style>`"


@pytest.mark.parametrize("command", ["accelerate launch x.py", "x.py 'a\n```\n# b'", "x.py '`````'"])
def test_a_command_with_fences_is_one_block(command):
    (block,) = PARSER.parse(fence(command, "bash"))
    assert (block.type, block.info, block.content) == ("fence", "bash", f"{command}\n")


def test_the_card_of_a_set_of_odd_names_shows_and_holds_them(tmp_path):
    names = list(dict.fromkeys(NAMES))
    settings = {"batch_size": 2, "prompt|s": None} | {f"set {number}": name for number, name in enumerate(names)}
    real_images, folder = {"dataset_name": "folder|of `cars`"}, tmp_path / "a set"
    card = write_set_card(folder, {"a`b": UNKNOWN}, "user/sd|x", names, settings=settings, real_images=real_images)
    settings, classes = tables(card.text)
    assert settings[1] == ["batch_size", "2"]  # what is None is not shown
    assert settings[2:] == [[f"set {number}", one_line(name)] for number, name in enumerate(names)]
    assert classes[1:] == [[one_line(name), one_line(f"a {name}"), "1", "0"] for name in names]
    assert "folder|of `cars`" in html.unescape(re.sub("</?code>", "", card.text))
    features = metadata_load(folder / "README.md")["dataset_info"]["features"]
    (label,) = [feature for feature in features if feature["name"] == "label"]
    assert list(label["dtype"]["class_label"]["names"].values()) == names
    text_before = (folder / "README.md").read_text()
    save_card(text_before, folder / "README.md")  # merged with itself
    assert (folder / "README.md").read_text() == text_before


@pytest.mark.parametrize("name", ["a|b", "two\nlines", "# c", "`t`", 'say "x"', "back\\slash", "<b>"])
def test_the_cards_of_token_and_classifier_hold_odd_folder_names(name, tmp_path):
    token = write_style_card(tmp_path / "token", f"/models/{name}", f"/data/{name}").text
    lora = {"lora": {"lora_r": 8, "lora_alpha": 8}}
    classifier = write_classifier_card(tmp_path / "classifier", f"/models/{name}", f"/data/{name}", config=lora).text
    assert [len(row) for row in tables(classifier)[1]] == [7] * 5
    for card in (token, classifier):
        inlines = [token for token in PARSER.parse(card) if token.type == "inline" and "/data/" in seen_safely(token)]
        assert one_line(f"/data/{name}") in seen_safely(inlines[0])
        for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
            compile(block, "card", "exec")


def seen_safely(token) -> str:
    return "".join(child.content for child in token.children if child.type != "html_inline")


def test_the_report_of_a_comparison_holds_odd_names_of_sets(tmp_path):
    method = "bridged@a|b"
    entry = {"method": method, "volume": None, "num_shots": None, "mean": 50.0, "std": None, "num_test_images": 3,
             "gain": 1.0, "gain_low": 0.5, "gain_high": 2.0, "num_seeds": 1, "values": [50.0],
             "steps": 1, "images_seen": 1, "seconds": 1, "gpu_hours": None}  # fmt: skip
    recipe = {"learning_rate": 0.1, "max_steps": 3, "head_learning_rate_factor": 1.0}
    write_markdown(
        tmp_path / "comparison.md", [entry], "vanilla", findings=[f"`{method}` gains [0.5, 2.0]"], seeds=[0],
        sets={"a|b": "/sets/`x`"}, own_sets=False, classifiers=parse_classifiers(["m|1"]), real="# r",
        chosen={"m|1": {method: {"all": recipe}, "stage1": {}}}, chosen_how="given", command="the command",
    )  # fmt: skip
    card = (tmp_path / "comparison.md").read_text()
    accuracy, costs, recipes = tables(card)
    assert [row[0] for row in (accuracy[1], costs[1], recipes[1])] == [method] * 3
    assert [len(row) for table in (accuracy, costs, recipes) for row in table] == [4, 4, 5, 5, 5, 5]


def test_the_quality_section_holds_odd_class_names():
    figures = ("shift", "shift_floor", "diversity", "real_diversity", "own_share", "real_own_share")
    classes = [{"class": name} | dict.fromkeys(figures, 1.0) for name in NAMES[:10]]
    count = {"used": 1}
    section = quality_section({
        "model": {"id": "m", "revision": None},
        "num_images": {"synthetic": count, "train": count, "held_out": count, "test": count},
        "verdicts": [{"subject": "classes", "level": "bad", "text": f"far: {', '.join(NAMES)}"}],
        "distance": {"frechet": {"floor": None}}, "classes": classes, "caveats": ["# none"],
    })  # fmt: skip
    verdicts, shown = tables(section)
    assert [len(row) for row in verdicts] == [3, 3]
    assert [row[0] for row in shown[1:]] == [one_line(name) for name in NAMES[:10]]


def test_a_license_with_odd_words_is_a_link():
    shown = str(License("other", "a] | b", "https://x.org/a (b)?c=d#e"))
    (inline,) = [token for token in PARSER.parse(f"- {shown}") if token.type == "inline"]
    link = inline.children[0]
    assert (link.type, link.attrs["href"]) == ("link_open", "https://x.org/a%20%28b%29?c=d#e")
    assert str(UNKNOWN).startswith("unknown (no license found in its card; look it up")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "not set"), ([1.2], "`1.2`"), ([3.0, "a"], "`3.0, a`"), ([], "`none`"), (True, "`true`"),
        ({"steps": [1, None]}, "`steps: 1, not set`"), (0, "`0`"),
    ],
)  # fmt: skip
def test_settings_are_shown_as_people_write_them(value, shown):
    assert code(value) == shown
