import time

import pytest

from utils.cli.errors import UserError
from utils.data.class_names import prompt_nouns, read_class_names, read_class_names_file
from utils.data.name_doctor import DOUBLE_MEANINGS, Finding, check_strict, diagnose, print_findings, write_class_names


def find(*class_names: str, given=()) -> list[Finding]:
    return diagnose(list(class_names), prompt_nouns(list(class_names)), given)


def problems(*class_names: str, given=()) -> list[tuple[str, str]]:
    return [(finding.class_name, finding.problem) for finding in find(*class_names, given=given)]


@pytest.fixture
def printed(capsys, monkeypatch):
    """Return a function that returns the printed findings, 120 columns wide."""
    monkeypatch.setenv("COLUMNS", "120")
    return lambda findings: print_findings(findings) or capsys.readouterr().out


def test_diagnose_of_good_names_finds_nothing():
    assert find("airplane", "T-shirt/top", "F-16A", "iPhone", "BMW X5", "red fox", "Ankle boot", "C-130", "A320") == []


@pytest.mark.parametrize(
    ("class_name", "problem"),
    [
        ("n02123045", "a WordNet id"), ("12", "no letters"), ("737-200", "no letters"), ("--", "no letters"),
        ("3f2a9c41", "an id"), ("3F2A9C41", "an id"), ("550e8400-e29b-41d4-a716-446655440000", "an id"),
        ("class_12", "an id"), ("label3", "an id"), ("Category 7", "an id"), ("c0", "an id"),
        ("/m/01g317", "an id"), ("01_class_3", "an id"),
    ],
)  # fmt: skip
def test_diagnose_of_an_id_asks_for_a_noun(class_name, problem):
    (finding,) = find("airplane", class_name)
    assert (finding.class_name, finding.problem) == (class_name, f"{problem}: give its noun")
    assert finding.is_warning
    assert finding.proposal is None


def test_diagnose_of_a_word_like_an_id_finds_none():
    found = problems("airplane", "cafe", "facade", "face2face", "class", "dead cat", "cab2", "decade12")
    assert not any("give its noun" in problem for _, problem in found)


@pytest.mark.parametrize(
    ("class_name", "problem", "is_warning", "proposal"),
    [
        ("AnnualCrop", "CamelCase", True, "annual crop"),
        ("apple_pie", "underscores", False, "apple pie"),
        ("boeing737", "digits glued to a word", True, "boeing 737"),
        ("001.Albatross", "numbering in front", True, "Albatross"),
    ],
)
def test_diagnose_of_a_spelling_proposes_the_noun(class_name, problem, is_warning, proposal):
    assert find("airplane", class_name) == [Finding(class_name, proposal, problem, is_warning, proposal)]


def test_diagnose_names_each_spelling_and_numbering_in_all_classes_is_a_note():
    assert [problem for _, problem in problems("airplane", "01.big_RedFox2")] == [
        "numbering in front", "underscores", "digits glued to a word", "CamelCase",
    ]  # fmt: skip
    assert [finding.is_warning for finding in find("001.Wren", "002.Finch")] == [False, False]
    assert [finding.is_warning for finding in find("2_door_car", "bus")] == [True, False]


def test_diagnose_of_an_uncorrected_noun_warns():
    names, nouns = ["01.Wren", "02.RedFinch"], ["01.Wren", "02.RedFinch"]
    findings = diagnose(names, nouns)
    assert all(finding.is_warning for finding in findings)
    assert [(finding.noun, finding.proposal) for finding in findings[-2:]] == [("02.RedFinch", "red finch")] * 2


@pytest.mark.parametrize(
    ("one", "other"),
    [("T-shirt", "t shirt"), ("post card", "Postcard"), ("sunglass", "sunglasses"), ("box", "boxes"),
     ("puppy", "puppies"), ("cookie", "cookies"), ("fox", "fox!")],
)  # fmt: skip
def test_diagnose_of_nearly_the_same_nouns_warns_of_both(one, other):
    expected = [(one, f"nearly the same as '{other}'"), (other, f"nearly the same as '{one}'")]
    assert problems("airplane", one, other) == expected


def test_diagnose_of_a_noun_within_another_names_where():
    assert problems("apple", "apple_pie", "pineapple", "green apples", "rice bowl", "rice") == [
        ("apple", "also part of 'apple pie', 'green apples'"),
        ("apple_pie", "underscores"),
        ("rice", "also part of 'rice bowl'"),
    ]
    assert problems("sea lion", "sea mountain lion") == []  # not next to each other


def test_diagnose_of_a_double_meaning_names_both_and_a_word_that_ends_like_a_plural_is_whole():
    for class_name in ("crane", "Crane", "cranes"):
        found = [(class_name, "two meanings: write 'crane bird' or 'construction crane'")]
        assert problems("wren", class_name) == found
    assert problems("Iris") == [("Iris", "two meanings: write 'iris flower' or 'iris of an eye'")]
    assert problems("bus", "bu", "S", "glass house", "glas house") == []


def test_proposed_nouns_resolve_double_meanings():
    assert len(DOUBLE_MEANINGS) >= 60
    for word, meanings in DOUBLE_MEANINGS.items():
        assert [problem for _, problem in problems(word)] == [f"two meanings: write '{meanings[0]}' or '{meanings[1]}'"]
        assert len(set(meanings)) == 2
        for meaning in meanings:
            assert problems(meaning) == []


def test_diagnose_compares_with_nouns_that_a_person_chose_without_judging_them():
    names = ["n02123045", "crane", "apple", "apple_pie", "AnnualCrop"]
    assert problems(*names, given={"n02123045", "crane", "apple", "AnnualCrop"}) == [("apple_pie", "underscores")]
    # as in the record of a style token, which has nouns without their origin
    nouns = ["tabby cat", "crane bird", "apple fruit", "apple pie", "field"]
    assert [finding.class_name for finding in diagnose(names, nouns)] == ["apple_pie"]
    (finding,) = diagnose(["n02123045", "tabby cat"], ["Tabby-cats", "tabby cat"], {"n02123045"})
    assert finding.class_name == "tabby cat"


def test_the_time_of_diagnose_is_linear_in_the_number_of_classes():
    names = [f"thing {number} of kind {number % 7} and more words" for number in range(1000)]

    def seconds(num_classes: int) -> float:
        began = time.process_time()
        diagnose(names[:num_classes], names[:num_classes])
        return time.process_time() - began

    few, many = (min(seconds(num_classes) for _ in range(3)) for num_classes in (200, 1000))
    assert many < 12 * few  # 5 times the classes, 25 times the pairs


def test_print_findings_shows_class_noun_problem_and_proposal(printed):
    text = printed(find("AnnualCrop", "crane", "[red]hat_[/red]", "[blue]boeing737[/blue]"))
    assert "AnnualCrop" in text and "annual crop" in text and "CamelCase" in text
    assert "[blue]boeing737[/blue]" in text and "[blue]boeing 737[/blue]" in text
    assert "two meanings: write" in text
    assert "underscores (1): '[red]hat_[/red]' is '[red]hat [/red]' in a prompt" in text


def test_print_findings_of_200_classes_stays_short(printed):
    assert printed([]) == ""
    names = [f"fox_{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(200)]
    assert printed(find(*names)) == "underscores (200): 'fox_aa' is 'fox aa' in a prompt\n"
    text = printed(find(*(f"n{number:08}" for number in range(200)), "crane"))
    assert "a WordNet id: give its noun: 192 more" in text
    assert "n00000007" in text and "n00000008" not in text
    assert "crane" in text
    assert len(text.splitlines()) < 20


def test_check_strict_lists_the_classes_with_warnings():
    check_strict(find("apple_pie", "wren"))
    with pytest.raises(UserError, match="--strict_class_names true: warnings for 'crane', 'BigBoeing737';"):
        check_strict(find("crane", "apple_pie", "BigBoeing737"))
    with pytest.raises(UserError, match="'n00000009' and 2 more; --class_names_file resolves them"):
        check_strict(find(*(f"n{number:08}" for number in range(12))))


HARD_NAMES = [
    "no", "1", "null", "~", "it's", 'a "b"', "a: b", "a #b", "#c", "- d", "犬", "é\u2028x", "[x]", "{y}", "*z", "&w",
    "tab\there", "bell\x07", "x" * 300, "2020-01-01", "?", "emoji 😀", " blank ", "line\nbreak", "1e3", "key:", "%",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_write_class_names_is_read_back_with_any_names(tmp_path, suffix):
    path = tmp_path / "new" / f"names{suffix}"
    nouns = prompt_nouns(HARD_NAMES)
    findings = diagnose(HARD_NAMES, nouns) + [Finding("no", "no", "like bell\x07, line\nbreak: x", True, "not\u2028y")]
    write_class_names(path, HARD_NAMES, nouns, findings)
    expected = list(zip(HARD_NAMES, nouns))
    assert list(read_class_names(str(path)).items()) == expected
    assert list(read_class_names_file(str(path), HARD_NAMES).items()) == expected
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_write_class_names_puts_findings_above_their_line(tmp_path):
    names, nouns = ["crane", "RedFox", "BlueFox", "wren"], ["crane", "RedFox", "blue fox", "犬 " * 40 + "wren"]
    write_class_names(tmp_path / "names.yaml", names, nouns, diagnose(names, nouns))
    lines = (tmp_path / "names.yaml").read_text().splitlines()
    assert "--class_names_file" in lines[1]
    assert lines[2:] == [
        "# two meanings: write 'crane bird' or 'construction crane'",
        "crane: crane",
        "# CamelCase; proposal: red fox",
        "RedFox: RedFox",
        "# CamelCase",
        "BlueFox: blue fox",
        f"wren: {nouns[3]}",
    ]


def test_write_class_names_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "names.yaml"
    write_class_names(path, ["a"], ["a"], [])
    before = path.read_bytes()
    (tmp_path / ".names.yaml.tmp").mkdir()  # where the temporary file would be
    with pytest.raises(UserError, match="names.yaml: class names cannot be written .Is a directory.; choose"):
        write_class_names(path, ["b"], ["b"], [])
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="names.txt: must end in .yaml, as class names are written as YAML"):
        write_class_names(tmp_path / "names.txt", ["a"], ["a"], [])
