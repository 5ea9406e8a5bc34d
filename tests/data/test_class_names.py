import json

import pytest

from utils.cli.errors import UserError
from utils.data.class_names import (
    fold_class_name,
    list_names,
    match_class_names,
    prompt_nouns,
    propose_noun,
    read_class_names,
    read_class_names_file,
)

CLASS_NAMES = ["n01440764", "no", "ankle_boot"]


def read(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return read_class_names_file(str(folder / name), CLASS_NAMES)


@pytest.mark.parametrize(
    ("class_name", "noun"),
    [
        ("AnnualCrop", "annual crop"),
        ("CupOfTea", "cup of tea"),
        ("redFox", "red fox"),
        ("TVStand", "TV stand"),
        ("SmartTV", "smart TV"),
        ("Big_RedFox", "Big red fox"),
        ("apple_pie", "apple pie"),
        ("Apple___Black_rot", "Apple Black rot"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("001.ak47", "ak47"),
        (" 3_dog ", "dog"),
        ("12 - dog", "dog"),
        ("00-dog", "dog"),
        ("n02085620-Chihuahua", "Chihuahua"),
        ("boeing737", "boeing 737"),
        ("iPhone14", "iPhone 14"),
        ("18wheeler", "18 wheeler"),
        ("label3", "label 3"),
    ],
)
def test_propose_noun_writes_separate_words(class_name, noun):
    assert propose_noun(class_name) == noun


@pytest.mark.parametrize(
    "class_name",
    ["iPhone", "F-16A", "F/A-18", "T-shirt/top", "DC-10", "A320", "C-130", "737-200", "BAE 146-200", "ak47", "mp3",
     "18-wheeler", "2.0 turbo", "1st base", "MacBook", "McLaren", "DeLorean", "WiFi", "CDs", "USB", "Ankle boot",
     "éclair", "犬", "12", "___", "n02123045"],
)  # fmt: skip
def test_propose_noun_leaves_brands_and_types_alone(class_name):
    assert propose_noun(class_name) == class_name


def test_propose_noun_keeps_the_type_of_a_brand():
    assert propose_noun("BMW_X5") == "BMW X5"


def test_prompt_nouns_lose_underscores_and_double_spaces():
    assert prompt_nouns(["ankle_boot", "T-shirt/top", "red  fox"]) == ["ankle boot", "T-shirt/top", "red fox"]


def test_prompt_nouns_are_corrected_where_a_correction_is_given():
    assert prompt_nouns(CLASS_NAMES, {"no": " Noh  mask ", "n01440764": "a_b"}) == ["a_b", "Noh mask", "ankle boot"]


@pytest.mark.parametrize("corrections", [None, {"fig": "apple pie"}])
def test_prompt_nouns_that_collide_are_an_error_that_says_what_corrects_them(corrections):
    names = ["apple_pie", "fig"] if corrections else ["apple_pie", "apple pie", "fig"]
    with pytest.raises(UserError, match="'apple_pie', '.*': all are 'apple pie' in a prompt; .* --class_names_file"):
        prompt_nouns(names, corrections)


def test_prompt_nouns_that_differ_in_case_only_are_an_error():
    with pytest.raises(UserError, match="classes 'Jay', 'jay': all are 'Jay' in a prompt"):
        prompt_nouns(["wren", "Jay", "jay"])


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
        ("nouns.yaml", "'no': a\nankle_boot: b\n'no': c", "class 'no': is there twice"),
        ("nouns.json", '{"no": "a", "no": "b"}', "class 'no': is there twice"),
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.yaml", "zebra: striped horse\nAnnualCrop: ' a   field'\n'no': Noh mask\n"),
        ("names.json", '{"zebra": "striped horse", "AnnualCrop": "a field", "no": "Noh mask"}'),
    ],
)
def test_read_class_names_of_a_mapping_keeps_order_and_nouns(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    names = read_class_names(str(tmp_path / name))
    assert list(names.items()) == [("zebra", "striped horse"), ("AnnualCrop", "a field"), ("no", "Noh mask")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "# ours\nzebra\n\nAnnualCrop\napple_pie\n"),
        ("names.json", '["zebra", "AnnualCrop", "apple_pie"]'),
        ("names.yml", "- zebra\n- AnnualCrop\n- apple_pie\n"),
    ],
)
def test_read_class_names_of_a_list_proposes_the_nouns(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    names = read_class_names(str(tmp_path / name))
    assert list(names.items()) == [("zebra", "zebra"), ("AnnualCrop", "annual crop"), ("apple_pie", "apple pie")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.txt", "# nothing\n\n", "has no classes"),
        ("names.json", "{}", "has no classes"),
        ("names.yaml", "", "must be a mapping of class names to nouns, or a list"),
        ("names.yaml", "cat\n", "must be a mapping of class names to nouns, or a list"),
        ("names.txt", "cat\ndog\ncat\n", "class 'cat': is there twice"),
        ("names.yaml", 'cat: a\ndog: b\n"cat": c\n', "class 'cat': is there twice"),
        ("names.json", '{"cat": "a", "dog": "b", "cat": "c"}', "class 'cat': is there twice"),
        ("names.yaml", "- cat\n- no\n", r"class 2 \(False\): must be text, in YAML within quotes"),
        ("names.json", '["cat", " "]', r"class 2 \(' '\): must be text"),
        ("names.yaml", "1: cat\n", "entry '1: cat': put quotes"),
        ("names.json", '{"cat": " "}', "entry 'cat': its noun is empty"),
        ("names.json", '{" ": "cat"}', "entry ' : cat': its class name is empty"),
        ("names.json", "[", "is malformed"),
    ],
)
def test_read_class_names_of_a_bad_file_names_file_and_entry(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"--class_names_file {tmp_path}/{name}: {message}"):
        read_class_names(str(tmp_path / name))


def test_read_class_names_with_equal_nouns_is_an_error(tmp_path):
    (tmp_path / "names.yaml").write_text("crane: crane\ncrane2: Crane\n")
    with pytest.raises(UserError, match="classes 'crane', 'crane2': all are 'crane' in a prompt"):
        read_class_names(str(tmp_path / "names.yaml"))


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("AM General Hummer SUV 2000", "am general hummer suv 2000"),
        ("caf\u00e9", "cafe\u0301"),  # é as one letter, and as a letter with an accent
        ("GROSSE STRASSE", "große Straße"),
        (" red\u00a0 fox", "Red fox"),
        ("\uff21\uff13\uff12\uff10", "a320"),  # full-width letters
        ("\u1fb3", "\u0391\u0399"),  # a Greek letter whose upper case is two
    ],
)
def test_names_that_differ_in_case_spaces_or_unicode_form_match(name, class_name, caplog):
    assert name != class_name
    assert match_class_names([name], [class_name, "other"], "--flag f:") == {name: class_name}
    assert match_class_names([class_name], [name, "other"], "--flag f:") == {class_name: name}
    assert caplog.messages[0] == (
        f"--flag f: 1 class name matched in spite of case, spaces or Unicode form: '{name}' is '{class_name}'."
    )


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("737-200", "737 200"), ("red_fox", "red fox"), ("a-10", "a_10"), ("C", "C++"), ("1", "01")],
)
def test_names_that_differ_in_signs_do_not_match(name, class_name, caplog):
    assert match_class_names([name], [class_name], "--flag") == {}
    assert fold_class_name(name) != fold_class_name(class_name)
    assert caplog.messages == []


def test_an_equal_name_wins_over_one_in_another_case(caplog):
    assert match_class_names(["jay", "Jay"], ["Jay", "wren", "jay"], "--flag") == {"jay": "jay", "Jay": "Jay"}
    assert match_class_names(["Jay"], ["jay", "Jay"], "--flag") == {"Jay": "Jay"}
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("names", "class_names", "listed"),
    [
        (["JAY"], ["Jay", "jay"], "'JAY': .* 'JAY', 'Jay', 'jay' are the same; write"),
        (["Jay", "JAY"], ["jay"], "'Jay', 'JAY': .* 'Jay', 'JAY', 'jay' are"),
        (["Jay", "jay"], ["jay"], "'Jay': .* 'Jay', 'jay' are"),
        (["Jay", "JAY"], ["Jay", "jay"], "'JAY': .* 'Jay', 'JAY', 'jay' are"),
    ],
)
def test_names_that_are_not_clear_are_one_line_that_lists_them(names, class_names, listed):
    with pytest.raises(UserError, match=f"^--flag {listed}") as raised:
        match_class_names(["wren", *names], ["wren", *class_names], "--flag")
    assert "\n" not in str(raised.value)


def test_several_names_of_one_class_are_taken_where_they_need_not_be_unique():
    assert match_class_names(["Jay", "JAY", "jay"], ["jay"], "--flag x", is_unique=False) == {
        "jay": "jay", "Jay": "jay", "JAY": "jay",
    }  # fmt: skip
    with pytest.raises(UserError, match="--flag x 'JAY': not clear"):
        match_class_names(["JAY"], ["Jay", "jay"], "--flag x", is_unique=False)


def test_a_file_in_another_case_gives_its_nouns_to_the_real_classes(tmp_path, caplog):
    assert read(tmp_path, "nouns.yaml", "Ankle_Boot: boot\n'NO': Noh mask\n") == {
        "ankle_boot": "boot",
        "no": "Noh mask",
    }
    assert caplog.messages[0].startswith(f"--class_names_file {tmp_path}/nouns.yaml: 2 class names matched in spite")
    with pytest.raises(UserError, match="nouns.yaml: 'NO', 'No': not clear which class is meant"):
        read(tmp_path, "nouns.yaml", "'NO': a\n'No': b\n")
    with pytest.raises(UserError, match="nouns.yaml: 'No': not clear which class is meant"):
        read(tmp_path, "nouns.yaml", "'no': a\n'No': b\n")


def test_list_names_stops_at_ten():
    assert list_names(["a", "b"]) == "'a', 'b'"
    assert list_names(list("abcdefghij")).endswith("'i', 'j'")
    assert list_names(list("abcdefghijkl")).endswith("'j' and 2 more")
