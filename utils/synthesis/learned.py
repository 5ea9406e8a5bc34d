"""What train_dsi.py learns besides the style token, a LoRA and class tokens: checked against the token's record."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.cli.errors import UserError
from utils.cli.records import DSI_CONFIG
from utils.hub.repositories import Source
from utils.synthesis.generators import Generator
from utils.synthesis.lora import LoraAdapter

TOKEN = "a style token of train_dsi.py"
LEARNED_LORA, CLASS_EMBEDS = "learned_lora_sha256", "class_embeds_sha256"  # among a set's settings


@dataclass(frozen=True)
class ClassTokens:
    """A learned word for each class, in the order of the label ids; its row in `path`, one table per text encoder."""

    source: Source
    names: tuple[str, ...]
    path: Path
    sha256: str

    def check(self, generator: Generator, num_classes: int) -> None:
        """Check that each class has a token that fits the generator's text encoders, as far as configs show.

        Raises:
            UserError: the file is not readable, has NaN or infinite embeddings, or other shapes.
        """
        prefix = f"{self.source.flag} {self.source.name}: its {self.path.name}"
        try:
            with safe_open(self.path, "np") as rows:
                tables = [rows.get_tensor(name) for name in sorted(rows.keys())]  # by name
        except (SafetensorError, OSError) as error:
            raise UserError(f"{prefix} cannot be read as safetensors ({error}).") from None
        if not all(abs(table).max(initial=0) < float("inf") for table in tables):
            raise UserError(
                f"{prefix} has NaN or infinite embeddings: the file is damaged, or its training diverged; train it "
                "again."
            )
        encoders = sorted(generator.family.text_encoders, key=lambda encoder: encoder.rows)  # by name, as well
        shapes = [table.shape for table in tables]
        wanted = [(num_classes, generator.config(encoder.part).get("hidden_size")) for encoder in encoders]
        if len(self.names) != num_classes or shapes != wanted:
            raise UserError(
                f"{prefix} has {len(self.names)} class tokens with embeddings of shape {shapes}; {num_classes} classes "
                f"and the text encoders need {wanted}. Train them for this generator."
            )


def open_learned_lora(source: Source, entry: dict) -> LoraAdapter:
    """Return the LoRA that was learned with a style token; `entry` is that of the token's record.

    Raises:
        UserError: the file is missing, or is not the recorded one.
        KeyError: the entry is incomplete.
    """
    path, sha256 = _open_recorded_file(source, entry)
    return LoraAdapter(source, entry["filename"], 1.0, path, sha256, is_learned=True)


def open_class_tokens(source: Source, entry: dict) -> ClassTokens:
    """Return the class tokens that were learned with a style token; `entry` is that of the token's record.

    Raises:
        UserError: the file is missing, or is not the recorded one.
        KeyError: the entry is incomplete.
    """
    return ClassTokens(source, tuple(entry["names"]), *_open_recorded_file(source, entry))


def _open_recorded_file(source: Source, entry: dict) -> tuple[Path, str]:
    filename, recorded = entry["filename"], entry["sha256"]
    path = source.file(filename, TOKEN)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != recorded:
        raise UserError(
            f"{source.flag} {source.name}: its {filename} is not the file that its {DSI_CONFIG} names (sha256 "
            f"{sha256[:12]}, recorded {str(recorded)[:12]}); copy the whole folder again, or train the token again."
        )
    return path, sha256
