"""The ground of the house. What OpenMP reads when torch is imported is set here, as every script begins with an import
from this room."""

from utils.cli.threads import prepare_threads

prepare_threads()
