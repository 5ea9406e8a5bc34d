"""What a card says about its sources: their ids on the Hub, and their licences, never guessed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from utils.cli.errors import UserError
from utils.hub.markdown import text
from utils.hub.merged_card import parse_card, read_card
from utils.hub.repositories import REPO_ID, Source, open_source

UNKNOWN = "unknown"


@dataclass(frozen=True)
class License:
    """A licence as a card names it: the Hub's id, and for 'other' its name and link."""

    id: str = UNKNOWN
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        words = f"{self.id} ({self.name})" if self.name else self.id
        return f"[{text(words)}]({quote(self.link, ':/?#&=%,;+@')})" if self.link else text(words)

    def to_metadata(self) -> dict:
        """Return the card metadata `license`, and `license_name` and `license_link` where it has them."""
        metadata = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in metadata.items() if value}


def read_license(name: str, repo_type: str, revision: str | None = None, token: str | None = None) -> License:
    """Return the licence that the card of a folder or repository names.

    'unknown' where it names none, where there is no readable card, and where the Hub is out of reach: a licence is no
    reason to end a run.
    """
    try:
        return license_in_card(open_source(name, "licence of", repo_type, revision, token))
    except (UserError, OSError):  # an OSError is any other answer of the Hub
        return License()


def license_in_card(source: Source) -> License:
    """Return the licence that a source's card names, 'unknown' where it names none.

    Raises:
        UserError: there is no card, or it cannot be read.
    """
    metadata, _, _ = parse_card(read_card(source.file("README.md")))
    ids = metadata.get("license") or UNKNOWN
    link = str(metadata.get("license_link") or "")
    return License(
        id=", ".join(map(str, ids)) if isinstance(ids, list) else str(ids),
        name=str(metadata["license_name"]) if metadata.get("license_name") else None,
        # a file beside the source's card is not beside ours
        link=link if re.match("https?://", link) else None,
    )


def read_licenses(sources: Iterable[tuple[str, str, str | None]], token: str | None = None) -> dict[str, License]:
    """Return the licence of each source, given as name, repository type and revision."""
    return {name: read_license(name, repo_type, revision, token) for name, repo_type, revision in sources}


def common_license(licenses: Iterable[License]) -> License:
    """Return the licence that all sources name, an unknown one where they differ or one names several."""
    different = set(licenses)
    common = different.pop() if len(different) == 1 else License()
    return License() if "," in common.id else common


def hub_ids(*names: str | None) -> list[str]:
    """Return those names that are repository ids, each once; not folders, which are nothing on the Hub."""
    return list(dict.fromkeys(name for name in names if name and REPO_ID.match(name) and not Path(name).is_dir()))
