"""A person's text in a card stays, the generated part is replaced; licenses are read from cards."""

import pytest
import yaml
from huggingface_hub import ModelCard

from utils.cli.errors import UserError
from utils.hub.cards import BEGIN, END, License, check_card, hub_ids, merge_cards, read_license, save_card

pytest_plugins = ["tests.local_hub.fixtures"]


def make_card(text: str = "our figures", around: tuple[str, str] = ("", ""), **metadata) -> str:
    """Return a card like those of the templates; `around` is a person's text before and after the markers."""
    before, after = around
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n{before}\n{BEGIN}\n{text}\n{END}\n{after}"


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.replace("\r\n", "\n").split("---\n")[1])


OURS = make_card("our figures", license="mit", tags=["b", "c"], base_model="user/new", pipeline_tag="text-to-image")
THEIRS = {
    "none of it": "",
    "text only": "# My card\n\nMy words.\n",
    "text without a last line end": "My words.",
    "metadata only": "---\nlicense: unknown\ntags: [a]\n---\n",
    "empty metadata": "---\n---\nMy words.\n",
    "markers": make_card("old", ("# Mine\n", "\nThe end.\n"), license="apache-2.0", base_model="user/old"),
    "markers, windows": make_card("old", ("# Mine\n", "\nThe end.\n"), tags=["a"]).replace("\n", "\r\n"),
    "no end marker": make_card("old", ("# Mine\n", "\nThe end.\n")).replace(END, ""),
    "no begin marker": make_card("old", ("# Mine\n", "\nThe end.\n")).replace(BEGIN, ""),
    "flow mapping": "---\n{license: unknown, mine: [1, 2]}\n---\nMy words.\n",
    "comments and quotes": "---\n# the tags\ntags:\n- 'a'  # first\n# who\nlanguage: no\n---\nMy words.\n",
    "an alias of what is replaced": "---\nbase_model: &name user/old\nmine: *name\n---\nMy words.\n",
}


@pytest.mark.parametrize("theirs", THEIRS.values(), ids=THEIRS)
def test_merging_once_more_changes_nothing_and_the_hub_can_read_it(theirs):
    merged = merge_cards(OURS, theirs)
    assert merge_cards(OURS, merged) == merged
    card = ModelCard(merged)
    assert card.data.base_model == "user/new"
    assert card.text.count("our figures") == 1
    their_text = theirs.replace("\r\n", "\n").split("---\n")[-1]
    words = [line for line in their_text.splitlines() if line not in ("old", BEGIN, END)]
    assert all(line in card.text for line in words)


@pytest.mark.parametrize("card", ["markers", "markers, windows"])
def test_text_between_the_markers_is_replaced_and_around_them_stays(card):
    merged = merge_cards(OURS, THEIRS[card])
    text = merged.replace("\r\n", "\n").split("---\n", 2)[2]
    assert text == f"# Mine\n\n{BEGIN}\nour figures\n{END}\n\nThe end.\n"
    assert ("\r\n" in merged) == ("windows" in card)
    assert merged.count("\r\n") in (0, merged.count("\n"))


def test_a_card_without_markers_keeps_its_text_above_ours():
    merged = merge_cards(OURS, THEIRS["text only"])
    assert merged.endswith(f"---\n# My card\n\nMy words.\n\n{BEGIN}\nour figures\n{END}\n")


def test_text_after_a_lost_end_marker_survives_two_runs():
    merged = merge_cards(make_card("second"), merge_cards(make_card("first"), THEIRS["no end marker"]))
    assert "The end." in merged and "second" in merged and "first" not in merged


def test_text_in_either_of_two_cards_is_in_the_merged_one():
    """The card in the folder was edited, and so was the one on the Hub."""
    ours = make_card("new", ("# From the folder\n", "\nfolder's end\n"))
    theirs = make_card("old", ("# From the Hub\n", "\nHub's end\n"))
    merged = merge_cards(ours, theirs)
    order = [merged.index(part) for part in ("From the Hub", "From the folder", "new", "Hub's end", "folder's end")]
    assert order == sorted(order)
    assert merge_cards(ours, merged) == merged
    without_markers = merge_cards("No markers here.\n", theirs)
    assert "No markers here." in without_markers and "# From the Hub" in without_markers


def test_generated_metadata_is_replaced():
    keys = ["dataset_info", "configs", "model-index", "base_model", "base_model_relation", "datasets"]
    keys += ["pipeline_tag", "library_name"]
    ours = {key: f"new {key}" for key in keys}
    assert metadata_of(merge_cards(make_card(**ours), make_card(**dict.fromkeys(keys, "old")))) == ours


def test_other_metadata_stays_and_new_entries_come_below():
    theirs = make_card(language="de", pretty_name="Mine", base_model="user/mine")
    merged = merge_cards(make_card(pretty_name="Ours", task_categories=["x"]), theirs)
    expected = {"language": "de", "pretty_name": "Mine", "base_model": "user/mine", "task_categories": ["x"]}
    assert list(metadata_of(merged).items()) == list(expected.items())


def test_metadata_that_stays_is_not_rewritten():
    merged = merge_cards(OURS, THEIRS["comments and quotes"])
    assert "# who\nlanguage: no\n" in merged  # Norwegian; rewritten, it would be 'false'
    assert "# the tags\n" in merged


@pytest.mark.parametrize(
    ("theirs", "tags"), [(["b", "a"], ["b", "a", "c"]), ("a", ["a", "b", "c"]), (None, ["b", "c"])]
)
def test_tags_of_both_cards_are_kept_theirs_first(theirs, tags):
    assert metadata_of(merge_cards(OURS, make_card(tags=theirs)))["tags"] == tags


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"license": "mit"}, {}, {"license": "mit"}),
        ({"license": "mit"}, {"license": "unknown"}, {"license": "mit"}),
        ({"license": "mit"}, {"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ({"license": "unknown"}, {"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ({"license": "unknown"}, {}, {"license": "unknown"}),
        ({"license": "other", "license_name": "rail", "license_link": "https://rail"},
         {"license": "other", "license_name": "mine"}, {"license": "other", "license_name": "mine"}),
        ({"license": "other", "license_name": "rail"}, {"license": "unknown", "license_link": "https://mine"},
         {"license": "other", "license_name": "rail"}),
    ],
)  # fmt: skip
def test_a_known_license_stays_with_its_name_and_link(ours, theirs, expected):
    assert metadata_of(merge_cards(make_card(**ours), make_card(**theirs))) == expected


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ("---\nlicense: [mit\n---\ntext", "is not valid YAML .* fix"),
        ("---\ncreated: 2026-13-01\n---\ntext", "is not valid YAML .* fix"),
        ("---\njust words\n---\ntext", "must be 'key: value' lines; fix"),
        ("---\nlicense: mit\ntext", "no closing line '---'; add it"),
        (b"---\nlicense: \xff\n---\n", "cannot be read .* save it as UTF-8"),
    ],
)
def test_malformed_metadata_is_one_error_with_the_file_and_the_card_stays(theirs, message, tmp_path):
    path = tmp_path / "README.md"
    content = theirs if isinstance(theirs, bytes) else theirs.encode()
    path.write_bytes(content)
    for attempt in (lambda: save_card(OURS, path), lambda: check_card(path)):
        with pytest.raises(UserError, match=message) as error:
            attempt()
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_saving_writes_a_new_card_or_merges_with_an_existing_one(tmp_path):
    path = tmp_path / "new folder" / "README.md"
    check_card(path)
    save_card(OURS, path)
    assert path.read_text() == OURS
    path.write_bytes(b"\xef\xbb\xbf" + OURS.replace("our figures", "old").encode() + "Grüße\n".encode())  # with a BOM
    save_card(OURS, path)
    assert path.read_text() == OURS + "Grüße\n"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", License("mit")),
        ("---\nlicense: [mit]\n---\n", License("mit")),
        ("---\nlicense: [mit, apache-2.0]\n---\n", License("mit, apache-2.0")),
        ("---\nlicense: other\nlicense_name: Rail\nlicense_link: https://rail\n---\n",
         License("other", "Rail", "https://rail")),
        ("---\nlicense: other\nlicense_name: Rail\nlicense_link: LICENSE.md\n---\n", License("other", "Rail")),
        ("---\ntags: [mit]\n---\nlicense: mit", License()),
        ("no metadata", License()),
        ("---\nlicense: [mit\n---\n", License()),
        ("---\nlicense: mit\nno: key\nmodel-index: nonsense\n---\n", License("mit")),
    ],
)  # fmt: skip
def test_the_license_of_a_folder_is_read_from_its_card(card, expected, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert read_license(str(tmp_path), "model") == expected


def test_a_license_that_cannot_be_read_is_unknown(tmp_path):
    assert read_license(str(tmp_path), "model") == License()  # no card
    assert read_license("user/out-of-reach", "dataset") == License()
    assert read_license("user/out-of-reach", "dataset", "0" * 40, "hf_secret") == License()
    assert read_license("neither folder nor id", "model") == License()


def test_the_license_of_a_repository_is_read_at_the_commit_with_the_token(local_hub):
    local_hub.add_user("ann", "hf_ann")
    repository = local_hub.create_repo("ann/cars", "dataset", private=True)
    commit = repository.commit({"README.md": b"---\nlicense: mit\n---\n"})
    repository.commit({"README.md": b"---\nlicense: cc0-1.0\n---\n"})
    assert read_license("ann/cars", "dataset", commit) == License()
    assert read_license("ann/cars", "dataset", commit, "hf_ann") == License("mit")


def test_hub_ids_are_repository_ids_without_duplicates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)  # looks like an id
    assert hub_ids("models/base", "user/a", None, "user/a", "/abs", "user/b") == ["user/a", "user/b"]
