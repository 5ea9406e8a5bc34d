"""Where a folder is published: the flags, a repository that the user can write to, and calls with retries.

The client itself retries reads and uploads, but not commits, nor calls that create or describe a repository.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import validate_repo_id

from utils.cli.errors import UserError
from utils.cli.options import option, with_flag
from utils.cli.processes import is_main_process

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_TRIES = 6
FIRST_PAUSE = 1.0  # seconds, doubled with every try
LONGEST_PAUSE = 60.0
WITH_PUSH_TO_HUB = [with_flag("push_to_hub")]
TRANSIENT_STATUSES = {408, 429, 500, 502, 503, 504}


@dataclass
class HubArguments:
    """Publishing and access."""

    _argument_group_name = "Hub"

    push_to_hub: bool = option(False, "Push the output folder to the Hub.", affects_result=False)
    hub_private_repo: bool = option(
        False, "Create the repository as private.", affects_result=False, needs=WITH_PUSH_TO_HUB
    )
    hub_revision: str | None = option(
        None, "Branch to push to, created if missing (default: main).", affects_result=False,
        needs=WITH_PUSH_TO_HUB,
    )  # fmt: skip
    hub_token: str | None = option(
        None, "Access token (default: HF_TOKEN, else that of `hf auth login`).", affects_result=False
    )


def log_and_sleep(problem: str, pause: float) -> None:
    if is_main_process():
        logger.warning(problem)
    time.sleep(pause)


@dataclass(frozen=True)
class Target:
    """A repository that the user can write to; `revision` is a branch, created if missing.

    `wait` is called between two tries with a one-line problem and the seconds to wait.
    """

    repo_id: str
    repo_type: str
    private: bool = False
    revision: str | None = None
    token: str | None = None
    wait: Callable[[str, float], None] = log_and_sleep

    def call(self, method: Callable[..., Result], **options) -> Result:
        """Return what a method of `HfApi` returns for this repository, called with retries.

        Raises:
            HubUnavailable: the limit of tries is reached.
        """
        options = {"repo_id": self.repo_id, "repo_type": self.repo_type, **options}
        api = HfApi(token=self.token or None)
        return with_retries(lambda: method(api, **options), f"publishing {self.repo_id}", self.wait)


def open_target(
    output_dir: str | Path, hub_id: str | None, repo_type: str, private: bool = False, revision: str | None = None,
    token: str | None = None,
) -> Target:  # fmt: skip
    """Return where a folder will be published, by default under its name in the user's account.

    Called before any work, so that a missing token does not waste a training. Nothing is created.

    Raises:
        UserError: the token is missing, invalid or without write access; the Hub is not reachable; the repository's
            name is malformed, or it is public although `private` is set.
    """
    what = "--push_to_hub"
    try:
        account = with_retries(HfApi(token=token or None).whoami, f"{what}: checking the account")
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{what}: no access token; log in with `hf auth login` or set HF_TOKEN.") from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE=1 is set; unset it or leave {what} out.") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise UserError(f"{what}: the Hub rejects this access token; log in with `hf auth login`.") from None
        raise UserError(f"{what}: the Hub refuses this access token ({error.response.status_code}).") from None
    repo_id = hub_id or Path(output_dir).resolve().name
    if "/" not in repo_id:
        repo_id = f"{account['name']}/{repo_id}"
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError:
        raise UserError(
            f"{what}: '{repo_id}' is not a repository id; give one with --hub_{repo_type}_id: user/name, of letters, "
            "digits, '-', '_' and '.'."
        ) from None
    access_token = account.get("auth", {}).get("accessToken", {})
    if access_token.get("role") == "read":
        raise UserError(f"{what}: this access token is read-only; create one with the role 'write'.")
    target = Target(repo_id, repo_type, private, revision, token)
    try:
        target.call(HfApi.auth_check, write=True)
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 403:
            raise UserError(
                f"{what}: this access token may not write to '{repo_id}'; ask for write access, or choose another "
                f"repository with --hub_{repo_type}_id."
            ) from None
        if not isinstance(error, errors.RepositoryNotFoundError):
            raise UserError(f"{what}: the Hub refuses '{repo_id}' ({error.response.status_code}).") from None
        _check_may_create(repo_id, account, access_token)
    else:
        check_privacy(target)
    return target


def _check_may_create(repo_id: str, account: dict, access_token: dict) -> None:
    """Check, with the Hub's facts on an account and its token, that they may create a repository.

    Raises:
        UserError: they may not.
    """
    namespace = repo_id.split("/")[0]
    roles = {account["name"]: None, **{org["name"]: org.get("roleInOrg") for org in account.get("orgs", [])}}
    if namespace not in roles:
        raise UserError(f"--push_to_hub: no write access to '{repo_id}'; you are {' and '.join(roles)}.")
    what = f"--push_to_hub: '{repo_id}' does not exist, and this access token may not create it;"
    if roles[namespace] == "read":
        raise UserError(f"{what} your role in '{namespace}' is 'read', but must be at least 'contributor'.")
    writable = [
        scope["entity"].get("name")
        for scope in access_token.get("fineGrained", {}).get("scoped", [])
        if "repo.write" in scope["permissions"]
    ]
    if access_token.get("role") == "fineGrained" and namespace not in writable:
        raise UserError(f"{what} it is fine-grained, without write access to '{namespace}'; add that in its settings.")


def check_privacy(target: Target) -> None:
    """Check that an existing repository is private if a private one is wanted.

    Raises:
        UserError: it is public.
    """
    if target.private and not target.call(HfApi.repo_info).private:
        raise UserError(
            f"--hub_private_repo: '{target.repo_id}' already exists and is public; make it private in its settings, or "
            f"choose another with --hub_{target.repo_type}_id."
        )


class HubUnavailable(UserError):
    """The Hub failed until the limit of tries; try again later."""


def with_retries(call: Callable[[], Result], what: str, wait: Callable[[str, float], None] = log_and_sleep) -> Result:
    """Return `call()`, with retries after transient failures: server errors, rate limits, lost connections.

    Raises:
        HubUnavailable: it failed `MAX_TRIES` times. Other errors are raised unchanged.
    """
    attempt = 1
    while True:
        try:
            return call()
        except (errors.HTTPError, OSError, RuntimeError) as error:
            pause = pause_after(error, attempt)
            if pause is None:
                raise
            if attempt == MAX_TRIES:
                raise HubUnavailable(f"{what}: gave up after {MAX_TRIES} tries ({first_line(error)}).") from error
            wait(f"{what}: {first_line(error)}; retrying in {pause:.0f} s (try {attempt} of {MAX_TRIES})", pause)
            attempt += 1


def pause_after(error: BaseException, attempt: int) -> float | None:
    """Return the seconds to wait before the next try, None if another try would not help."""
    cause = error
    # the client wraps failed uploads and downloads in these
    while isinstance(cause, (RuntimeError, errors.LocalEntryNotFoundError)) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        if cause.response.status_code not in TRANSIENT_STATUSES:
            return None
        asked = cause.response.headers.get("Retry-After", "")
        if asked.isdigit():
            return min(float(asked) + 1, LONGEST_PAUSE)
    elif isinstance(cause, errors.OfflineModeIsEnabled) or not isinstance(
        cause, (errors.HTTPError, ConnectionError, TimeoutError)
    ):
        return None
    return min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def first_line(error: BaseException) -> str:
    """Return an error's type and first line, without the advice that follows in the client's messages."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
