"""The flags of publishing and of access to the Hub."""

from dataclasses import dataclass, field

from utils.cli.options import without_effect


@dataclass
class HubArguments:
    """Publishing and access."""

    _argument_group_name = "Hub"

    push_to_hub: bool = field(default=False, metadata=without_effect("Publish the output folder on the Hub."))
    hub_private_repo: bool = field(
        default=False, metadata=without_effect("Make the repository private when creating it.")
    )
    hub_revision: str | None = field(
        default=None, metadata=without_effect("Branch to publish to, made when it is not there; main when not given.")
    )
    hub_token: str | None = field(
        default=None, metadata=without_effect("Access token; HF_TOKEN or `hf auth login` when not given.")
    )
