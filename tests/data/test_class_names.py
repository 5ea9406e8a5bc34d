import json

import pytest

from utils.cli.errors import UserError
from utils.data.class_names import prompt_nouns, read_class_names_file

CLASS_NAMES = ["n01440764", "no", "ankle_boot"]


def read(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return read_class_names_file(str(folder / name), CLASS_NAMES)


def test_prompt_nouns_lose_underscores_and_double_spaces():
    assert prompt_nouns(["ankle_boot", "T-shirt/top", "red  fox"]) == ["ankle boot", "T-shirt/top", "red fox"]


def test_prompt_nouns_are_corrected_where_a_correction_is_given():
    assert prompt_nouns(CLASS_NAMES, {"no": " Noh  mask ", "n01440764": "a_b"}) == ["a_b", "Noh mask", "ankle boot"]


@pytest.mark.parametrize("corrections", [None, {"fig": "apple pie"}])
def test_prompt_nouns_that_collide_are_an_error_that_says_what_corrects_them(corrections):
    names = ["apple_pie", "fig"] if corrections else ["apple_pie", "apple pie", "fig"]
    with pytest.raises(UserError, match="'apple_pie', '.*': all are 'apple pie' in a prompt; .* --class_names_file"):
        prompt_nouns(names, corrections)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nouns.json", json.dumps({"n01440764": "tench", "no": "Noh mask"})),
        ("nouns.yaml", "n01440764: tench\n'no': Noh mask\n"),
    ],
)
def test_a_mapping_may_name_some_classes(tmp_path, name, text):
    assert read(tmp_path, name, text) == {"n01440764": "tench", "no": "Noh mask"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nouns.txt", "# the nouns\ntench\n\n  Noh mask  \nC# boot\n"),
        ("nouns", "\ufefftench\r\nNoh mask\r\nC# boot\r\n"),
        ("nouns.json", '["tench", "Noh mask", "C# boot"]'),
        ("nouns.yml", "- tench\n- Noh mask\n- 'C# boot'\n"),
    ],
)
def test_a_list_is_in_label_order(tmp_path, name, text):
    assert read(tmp_path, name, text) == {"n01440764": "tench", "no": "Noh mask", "ankle_boot": "C# boot"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nouns.txt", "tench\n", "has 1 nouns for 3 classes; .* the first class is 'n01440764'"),
        ("nouns.json", '["a", "b", "c", "d"]', "has 4 nouns for 3 classes"),
        ("nouns.yaml", "ankle_bot: boot", "entry 'ankle_bot': no such class, did you mean ankle_boot?"),
        ("nouns.yaml", "xyz: boot", r"entry 'xyz': no such class\."),
        ("nouns.yaml", "no: Noh mask", "entry 'False: Noh mask': put quotes"),
        ("nouns.yaml", "ankle_boot: 1", "entry 'ankle_boot: 1': put quotes"),
        ("nouns.json", '["a", null, "c"]', "entry 'no: None': put quotes"),
        ("nouns.json", '{"no": " "}', "entry 'no': its noun is empty"),
        ("nouns.yaml", "boot", "must be a mapping of class names to nouns, or a list"),
        ("nouns.json", "{", "is malformed: Expecting"),
        ("nouns.yaml", "no: 2020-13-01", "is malformed: month must be"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_entry(tmp_path, name, text, message):
    with pytest.raises(UserError, match=f"--class_names_file {tmp_path}/{name}: {message}"):
        read(tmp_path, name, text)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--class_names_file no.txt: cannot be read .No such file"):
        read_class_names_file("no.txt", CLASS_NAMES)
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read .not UTF-8"):
        read_class_names_file(str(tmp_path / "latin.txt"), CLASS_NAMES)
