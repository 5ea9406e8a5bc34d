"""A Hugging Face Hub on the loopback address: the real clients push to it and load from it, no network needed."""

from tests.local_hub.faults import Fault, LoggedRequest
from tests.local_hub.hub import LocalHub

__all__ = ["Fault", "LocalHub", "LoggedRequest"]
