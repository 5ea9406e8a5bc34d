"""Where a folder is published: problems are reported before any work, and checks create nothing."""

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from tests.hub.conftest import TOKEN, published
from tests.hub.fault_sweep import FOLDERS, PATTERNS, write_folder
from utils.cli.errors import UserError
from utils.hub.publishing import publish_folder
from utils.hub.targets import open_target

pytest_plugins = ["tests.local_hub.fixtures"]

# the tokens of ann, by her role in the organisation acme or by what they may write to
ROLES = {f"hf_{role}": role for role in ("read", "contributor", "write", "admin")}
FINE_GRAINED = {"hf_mine": ("ann",), "hf_of_acme": ("acme",), "hf_one_repository": ("acme/ours",), "hf_nothing": ()}
MAY_NOT_WRITE = "--push_to_hub: this access token may not write to '{}'"
MAY_NOT_CREATE = "--push_to_hub: '{}' does not exist, and this access token may not create it"


@pytest.fixture
def acme(hub):
    """An organisation with repositories of ann and of others."""
    for token, role in ROLES.items():
        hub.add_user("ann", token, organisations={"acme": role})
    for token, writable in FINE_GRAINED.items():
        hub.add_user("ann", token, role="fineGrained", organisations={"acme": "write"}, writable=writable)
    hub.create_repo("acme/ours", creator="ann")
    hub.create_repo("acme/theirs", creator="bob")
    hub.create_repo("acme/hidden", creator="bob", private=True)
    hub.create_repo("bob/cars")
    return hub


def try_to_write(repo_id: str, token: str) -> bool:
    """Return whether the Hub lets a token create a repository, if needed, and commit to it."""
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, exist_ok=True)
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=repo_id)
    except HfHubHTTPError as error:
        assert error.response.status_code == 403
        return False
    return True


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "cars", "no access token"),
        ("hf_nobody", "cars", "the Hub rejects this access token"),
        ("hf_ann_reads", "cars", "is read-only"),
        (TOKEN, "bob/new", "no write access to 'bob/new'; you are ann"),
        (TOKEN, "my cars", "--push_to_hub: 'ann/my cars' is not a repository id; give one with --hub_model_id"),
        (TOKEN, "acme/ann/cars", "--push_to_hub: 'acme/ann/cars' is not a repository id"),
    ],
)
def test_a_forbidden_target_is_reported_before_any_work(token, name, message, hub, tmp_path):
    with pytest.raises(UserError, match=message):
        open_target(tmp_path, name, "model", token=token)
    assert hub.repos() == []


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_read", "acme/theirs", MAY_NOT_WRITE),
        ("hf_read", "acme/hidden", MAY_NOT_WRITE),
        ("hf_read", "acme/new", MAY_NOT_CREATE + r"; your role in 'acme' is 'read'"),
        ("hf_read", "ann/new", None),
        ("hf_contributor", "acme/ours", None),
        ("hf_contributor", "acme/theirs", MAY_NOT_WRITE),
        ("hf_contributor", "acme/new", None),
        ("hf_write", "acme/theirs", None),
        ("hf_write", "bob/cars", MAY_NOT_WRITE),
        ("hf_admin", "acme/hidden", None),
        ("hf_admin", "acme/new", None),
        ("hf_mine", "ann/new", None),
        ("hf_mine", "acme/new", MAY_NOT_CREATE + "; it is fine-grained, without write access to 'acme'"),
        ("hf_mine", "acme/ours", MAY_NOT_WRITE),
        ("hf_of_acme", "acme/new", None),
        ("hf_one_repository", "acme/ours", None),
        ("hf_one_repository", "acme/new", MAY_NOT_CREATE),
        ("hf_nothing", "ann/new", MAY_NOT_CREATE),
    ],
)
def test_a_role_that_may_not_write_is_refused_before_any_work(token, repo_id, message, acme, tmp_path):
    before = [repo.id for repo in acme.repos()]
    if message is None:
        assert open_target(tmp_path, repo_id, "model", token=token).repo_id == repo_id
    else:
        with pytest.raises(UserError, match=message.format(repo_id)):
            open_target(tmp_path, repo_id, "model", token=token)
    assert [repo.id for repo in acme.repos()] == before
    assert {request.method for request in acme.log} == {"GET"}
    # the Hub itself agrees
    assert try_to_write(repo_id, token) is (message is None)


def test_a_gated_repository_of_somebody_else_is_refused(acme, tmp_path):
    acme.create_repo("bob/gated", gated=True)
    with pytest.raises(UserError, match=MAY_NOT_WRITE.format("bob/gated")):
        open_target(tmp_path, "bob/gated", "model", token="hf_admin")


@pytest.mark.parametrize(("name", "is_private"), [("public", False), ("hidden", True), ("new", None)])
def test_a_public_repository_is_refused_before_any_work_if_a_private_one_is_wanted(name, is_private, hub, tmp_path):
    if is_private is not None:
        hub.create_repo(f"ann/{name}", "dataset", private=is_private)
    if is_private is False:
        with pytest.raises(UserError, match="--hub_private_repo: 'ann/public' already exists and is public; "):
            open_target(tmp_path, name, "dataset", private=True, token=TOKEN)
        assert published(hub, name) == {}
        assert open_target(tmp_path, name, "dataset", token=TOKEN).repo_id == "ann/public"
        return
    target = open_target(tmp_path, name, "dataset", private=True, token=TOKEN)
    publish_folder(write_folder(tmp_path / "cars", FOLDERS["set"], "x"), target, PATTERNS)
    assert hub.repo(f"ann/{name}", "dataset").private
    assert set(published(hub, name)) == set(FOLDERS["set"])


def test_a_repository_made_public_during_the_work_receives_nothing(hub, tmp_path):
    target = open_target(tmp_path, "cars", "dataset", private=True, token=TOKEN)
    hub.create_repo("ann/cars", "dataset")
    with pytest.raises(UserError, match="'ann/cars' already exists and is public"):
        publish_folder(write_folder(tmp_path / "cars", FOLDERS["set"], "x"), target, PATTERNS)
    assert published(hub) == {}


def test_without_a_network_publishing_is_refused_before_any_work(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push_to_hub: HF_HUB_OFFLINE=1 is set; unset it or leave --push_to_hub out"):
        open_target(tmp_path, "cars", "model", token=TOKEN)
    assert hub.log == []
