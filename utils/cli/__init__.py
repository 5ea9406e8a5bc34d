"""The lowest layer of `utils`. It sets OpenMP's environment before torch is imported: every script imports it first."""

from utils.cli.threads import prepare_threads

prepare_threads()
