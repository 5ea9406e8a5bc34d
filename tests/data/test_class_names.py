import json

import pytest

from utils.cli.errors import UserError
from utils.data.class_names import (
    find_similar_names,
    fold_class_name,
    list_names,
    match_class_names,
    prompt_nouns,
    propose_noun,
    read_class_names,
    read_class_names_file,
    sort_class_names,
)

CLASS_NAMES = ["n01440764", "no", "ankle_boot"]


def read(path, text):
    """Return the nouns of `CLASS_NAMES` in a file with this text."""
    path.write_text(text, encoding="utf-8")
    return read_class_names_file(str(path), CLASS_NAMES)


def read_alone(path, text):
    """Return the classes and nouns in a file with this text."""
    path.write_text(text, encoding="utf-8")
    return read_class_names(str(path))


@pytest.mark.parametrize(
    ("class_name", "noun"),
    [
        ("AnnualCrop", "annual crop"), ("CupOfTea", "cup of tea"), ("redFox", "red fox"), ("TVStand", "TV stand"),
        ("SmartTV", "smart TV"), ("Big_RedFox", "Big red fox"), ("apple_pie", "apple pie"),
        ("Apple___Black_rot", "Apple Black rot"), ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("001.ak47", "ak47"), (" 3_dog ", "dog"), ("12 - dog", "dog"), ("00-dog", "dog"),
        ("n02085620-Chihuahua", "Chihuahua"), ("boeing737", "boeing 737"), ("iPhone14", "iPhone 14"),
        ("18wheeler", "18 wheeler"), ("label3", "label 3"), ("BMW_X5", "BMW X5"),
    ],
)  # fmt: skip
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


def test_prompt_nouns_have_single_spaces_and_are_corrected_where_a_correction_is_given():
    assert prompt_nouns(["ankle_boot", "T-shirt/top", "red  fox"]) == ["ankle boot", "T-shirt/top", "red fox"]
    assert prompt_nouns(CLASS_NAMES, {"no": " Noh  mask ", "n01440764": "a_b"}) == ["a_b", "Noh mask", "ankle boot"]


@pytest.mark.parametrize(
    ("names", "corrections", "message"),
    [
        (["apple_pie", "apple pie", "fig"], None, "classes 'apple_pie', 'apple pie': all are 'apple pie' in a prompt"),
        (["apple_pie", "fig"], {"fig": "apple pie"}, "'apple_pie', 'fig': all are 'apple pie' .* --class_names_file"),
        (["wren", "Jay", "jay"], None, "classes 'Jay', 'jay': all are 'Jay' in a prompt"),
    ],
)
def test_prompt_nouns_that_collide_are_an_error_with_a_remedy(names, corrections, message):
    with pytest.raises(UserError, match=message):
        prompt_nouns(names, corrections)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # a mapping may name some classes, a list is in label order
        ("nouns.json", json.dumps({"n01440764": "tench", "no": "Noh mask"}), ["tench", "Noh mask"]),
        ("nouns.yaml", "n01440764: tench\n'no': Noh mask\n", ["tench", "Noh mask"]),
        ("nouns.txt", "# the nouns\ntench\n\n  Noh mask  \nC# boot\n", ["tench", "Noh mask", "C# boot"]),
        ("nouns", "\ufefftench\r\nNoh mask\r\nC# boot\r\n", ["tench", "Noh mask", "C# boot"]),
        ("nouns.json", '["tench", "Noh mask", "C# boot"]', ["tench", "Noh mask", "C# boot"]),
        ("nouns.yml", "- tench\n- Noh mask\n- 'C# boot'\n", ["tench", "Noh mask", "C# boot"]),
    ],
)
def test_a_file_gives_the_nouns_of_the_real_classes(tmp_path, name, text, expected):
    assert read(tmp_path / name, text) == dict(zip(CLASS_NAMES, expected))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("names.yaml", "zebra: striped horse\nAnnualCrop: ' a   field'\n'no': Noh mask\n",
         {"zebra": "striped horse", "AnnualCrop": "a field", "no": "Noh mask"}),
        ("names.json", '{"zebra": "striped horse", "AnnualCrop": "a field"}',
         {"zebra": "striped horse", "AnnualCrop": "a field"}),
        ("names.txt", "# ours\nzebra\n\nAnnualCrop\napple_pie\n",
         {"zebra": "zebra", "AnnualCrop": "annual crop", "apple_pie": "apple pie"}),
        ("names.json", '["zebra", "AnnualCrop"]', {"zebra": "zebra", "AnnualCrop": "annual crop"}),
        ("names.yml", "- zebra\n- AnnualCrop\n", {"zebra": "zebra", "AnnualCrop": "annual crop"}),
    ],
)  # fmt: skip
def test_a_file_alone_gives_the_classes_in_order_and_nouns_are_proposed_where_it_has_none(
    tmp_path, name, text, expected
):
    assert list(read_alone(tmp_path / name, text).items()) == list(expected.items())


@pytest.mark.parametrize(
    ("readers", "name", "text", "message"),
    [
        ([read], "nouns.txt", "tench\n", "has 1 nouns for 3 classes; .* starting with 'n01440764'"),
        ([read], "nouns.json", '["a", "b", "c", "d"]', "has 4 nouns for 3 classes"),
        ([read], "nouns.yaml", "ankle_bot: boot", "entry 'ankle_bot': no such class, did you mean ankle_boot?"),
        ([read], "nouns.yaml", "xyz: boot", r"entry 'xyz': no such class\."),
        ([read], "nouns.json", '["a", null, "c"]', "entry 'no: None': put quotes"),
        ([read_alone], "names.txt", "# nothing\n\n", "has no classes"),
        ([read_alone], "names.json", "{}", "has no classes"),
        ([read_alone], "names.txt", "cat\ndog\ncat\n", "class 'cat': duplicate"),
        ([read_alone], "names.yaml", "- cat\n- no\n", r"class 2 \(False\): must be text; in YAML, use quotes"),
        ([read_alone], "names.json", '["cat", " "]', r"class 2 \(' '\): must be text"),
        ([read, read_alone], "nouns.yaml", "no: Noh mask", "entry 'False: Noh mask': put quotes"),
        ([read, read_alone], "nouns.yaml", "ankle_boot: 1", "entry 'ankle_boot: 1': put quotes"),
        ([read, read_alone], "nouns.json", '{"no": " "}', "entry 'no': its noun is empty"),
        ([read, read_alone], "nouns.json", '{" ": "cat"}', "entry ' : cat': its class name is empty"),
        ([read, read_alone], "nouns.yaml", "'no': a\nankle_boot: b\n\"no\": c", "class 'no': duplicate"),
        ([read, read_alone], "nouns.json", '{"no": "a", "no": "b"}', "class 'no': duplicate"),
        ([read, read_alone], "nouns.yaml", "", "must be a mapping of class names to nouns, or a list"),
        ([read, read_alone], "nouns.yaml", "boot", "must be a mapping of class names to nouns, or a list"),
        ([read, read_alone], "nouns.json", "{", "is malformed: Expecting"),
        ([read, read_alone], "nouns.yaml", "no: 2020-13-01", "is malformed: month must be"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_entry(tmp_path, readers, name, text, message):
    for reader in readers:
        with pytest.raises(UserError, match=f"--class_names_file {tmp_path}/{name}: {message}"):
            reader(tmp_path / name, text)


def test_a_file_with_equal_nouns_or_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="classes 'crane', 'crane2': all are 'crane' in a prompt"):
        read_alone(tmp_path / "names.yaml", "crane: crane\ncrane2: Crane\n")
    with pytest.raises(UserError, match="--class_names_file no.txt: cannot be read .No such file"):
        read_class_names_file("no.txt", CLASS_NAMES)
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read .not UTF-8"):
        read_class_names_file(str(tmp_path / "latin.txt"), CLASS_NAMES)


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
        f"--flag f: 1 class name matched ignoring case, spaces and Unicode form: '{name}' is '{class_name}'."
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
        (["JAY"], ["Jay", "jay"], "'JAY': .* 'JAY', 'Jay', 'jay' differ"),
        (["Jay", "JAY"], ["jay"], "'Jay', 'JAY': .* 'Jay', 'JAY', 'jay' differ"),
        (["Jay", "jay"], ["jay"], "'Jay': .* 'Jay', 'jay' differ"),
        (["Jay", "JAY"], ["Jay", "jay"], "'JAY': .* 'Jay', 'JAY', 'jay' differ"),
    ],
)
def test_ambiguous_names_are_one_line_that_lists_them(names, class_names, listed):
    with pytest.raises(UserError, match=f"^--flag {listed}") as raised:
        match_class_names(["wren", *names], ["wren", *class_names], "--flag")
    assert "\n" not in str(raised.value)


def test_several_names_of_one_class_are_accepted_if_they_need_not_be_unique():
    names = ["Jay", "JAY", "jay"]
    assert match_class_names(names, ["jay"], "--flag x", is_unique=False) == dict.fromkeys(names, "jay")
    with pytest.raises(UserError, match="--flag x 'JAY': ambiguous"):
        match_class_names(["JAY"], ["Jay", "jay"], "--flag x", is_unique=False)


def test_a_file_in_another_case_gives_its_nouns_to_the_real_classes(tmp_path, caplog):
    nouns = read(tmp_path / "nouns.yaml", "Ankle_Boot: boot\n'NO': Noh mask\n")
    assert nouns == {"ankle_boot": "boot", "no": "Noh mask"}
    assert caplog.messages[0].startswith(f"--class_names_file {tmp_path}/nouns.yaml: 2 class names matched ignoring")
    for other, listed in (("NO", "'NO', 'No'"), ("no", "'No'")):
        with pytest.raises(UserError, match=f"nouns.yaml: {listed}: ambiguous"):
            read(tmp_path / "nouns.yaml", f"'{other}': a\n'No': b\n")


def test_list_names_stops_at_ten():
    assert list_names(["a", "b"]) == "'a', 'b'"
    assert list_names(list("abcdefghij")).endswith("'i', 'j'")
    assert list_names(list("abcdefghijkl")).endswith("'j' and 2 more")


def test_class_names_that_are_integers_are_in_numeric_order():
    assert sort_class_names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert sort_class_names(["10", "9", "b"]) == ["10", "9", "b"]
    assert sort_class_names(["²", "1"]) == ["1", "²"]


def test_names_that_differ_in_case_blanks_or_accents_are_found():
    names = ["Cat", "cat ", "CAT", "dog", "caf\u00e9", "cafe\u0301", "cafe", "St. Bernard", "St.  bernard"]
    assert find_similar_names(names) == [
        ["Cat", "cat ", "CAT"], ["caf\u00e9", "cafe\u0301"], ["St. Bernard", "St.  bernard"],
    ]  # fmt: skip
