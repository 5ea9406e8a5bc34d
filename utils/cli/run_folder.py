"""The folder of a run: new, unfinished or finished, with which options and inputs, and whether this run may resume
it."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from utils.cli.errors import UserError, report_how_to_resume
from utils.cli.options import REVISIONS, differing_options
from utils.cli.processes import warn_once, without_overwrite_flag
from utils.cli.records import (
    BRIDGED_CONFIG,
    COMPARISON,
    DSI_CONFIG,
    GENERATION_CONFIG,
    RUN_CONFIG,
    read_record,
    write_record,
    write_run_config,
)

# checkpoint-<step>, the earliest first, but not a user's own folders such as checkpoint-best
CHECKPOINTS = tuple("checkpoint-" + "[0-9]" * num_digits for num_digits in range(1, 10))
# the file that identifies the folder of each script
MADE = {
    DSI_CONFIG: "a style token", GENERATION_CONFIG: "a synthetic set", BRIDGED_CONFIG: "a classifier",
    COMPARISON: "a comparison",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """A folder in which a run with `options` (JSON values) makes `what`, such as 'a classifier' in messages.

    `record` is the file that is written last: if it exists, the run is finished. `noted_in` is the file that is written
    first, and its key with the run's options. `traces` are patterns of what an unfinished run leaves, such as
    checkpoints; `outputs` of what a finished run leaves. `free` are the options that do not affect the result. `inputs`
    maps options that name a dataset or a model to the identity of its contents, from `Source.identity`. With
    `overwrite` the run starts from scratch.
    """

    path: Path
    what: str
    options: dict
    record: str
    noted_in: tuple[str, str] = (RUN_CONFIG, "options")
    traces: tuple[str, ...] = ()
    free: frozenset[str] = frozenset()
    overwrite: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the result exists. A finished run is not repeated: the same command only publishes it.

        Raises:
            UserError: the result is of other options or inputs, or the folder is a file.
        """
        if self.path.is_file():
            raise UserError(f"--output_dir {self.path}: is a file; choose a folder.")
        if self.overwrite or not (self.path / self.record).exists():
            return False
        if differing := self.differing_options():
            raise UserError(
                f"--output_dir {self.path}: holds {self.what} made with other options ({'; '.join(differing)}); choose "
                "another folder or give --overwrite_output_dir."
            )
        if changed := self.differing_inputs():
            raise UserError(
                f"--output_dir {self.path}: holds {self.what} made from other inputs ({'; '.join(changed)}); choose "
                f"another folder or give --overwrite_output_dir{_revision_hint(changed)}."
            )
        self._warn_about_unknown_inputs()
        return True

    def warn_if_resume_is_ignored(self, resume: bool) -> None:
        """Warn if `resume` asks to resume a run that `overwrite` discards."""
        if resume and self.overwrite and self.find_traces():
            warn_once("--resume_from_checkpoint latest: ignored, as --overwrite_output_dir starts from scratch.")

    def find_traces(self) -> list[Path]:
        """Return what an unfinished run left, in the order of `traces`; matches of a pattern by length and name."""
        return self._find(self.traces)

    def _find(self, patterns: tuple[str, ...]) -> list[Path]:
        found = [sorted(self.path.glob(pattern), key=lambda path: (len(path.name), path.name)) for pattern in patterns]
        return [path for paths in found for path in paths]

    def is_resumable(self, resume: bool) -> bool:
        """Return whether there is an unfinished run with these options and `resume` asks to resume it.

        Raises:
            UserError: it has other options, or a new run would overwrite it.
        """
        traces = self.find_traces()
        if self.overwrite or not traces:
            self.warn_if_resume_is_ignored(resume)
            return False
        if not resume:
            raise UserError(
                f"--output_dir {self.path}: holds {traces[-1].name} of an unfinished run; give "
                "--resume_from_checkpoint latest to resume it, or --overwrite_output_dir to start from scratch."
            )
        self.check_options()
        self._warn_about_unknown_inputs()
        return True

    @property
    def is_begun(self) -> bool:
        """Whether a run of this kind has recorded its options here."""
        name, key = self.noted_in
        if not (self.path / name).exists():
            return False
        noted = read_record(self.path / name)
        return key in noted and noted.get("makes", self.what) == self.what

    def check_options(self) -> None:
        """Check that the unfinished run has these options and inputs.

        Raises:
            UserError: it has others.
        """
        if differing := self.differing_options():
            raise UserError(
                f"--resume_from_checkpoint latest: {self.path} was started with other options "
                f"({'; '.join(differing)}); give the same, or start from scratch with --overwrite_output_dir."
            )
        self.check_inputs()

    def check_inputs(self) -> None:
        """Check that the unfinished run has these inputs, as far as it recorded them.

        Raises:
            UserError: their contents differ.
        """
        if changed := self.differing_inputs():
            raise UserError(
                f"--resume_from_checkpoint latest: {self.path} was started with other inputs ({'; '.join(changed)}); "
                "start from scratch with --overwrite_output_dir, or in another --output_dir"
                f"{_revision_hint(changed)}."
            )

    def check_writable(self) -> None:
        """Check, before any work, that the folder is writable and that no output would overwrite a foreign file.

        Raises:
            UserError: it is not writable, belongs to another script, or holds a file that this run would write and that
                no run made.
        """
        check_writable(self.path)
        for name, what in MADE.items():
            if what != self.what and (self.path / name).exists():
                raise UserError(f"--output_dir {self.path}: holds {what} ({name}); choose another folder.")
        if self.is_begun or self.find_traces():
            return
        if foreign := next(iter(self._find(self.outputs)), None):
            raise UserError(
                f"--output_dir {self.path}: holds {foreign.relative_to(self.path)}, which would be overwritten, and is "
                f"not the folder of {self.what}; choose another folder."
            )

    def begin(self, keep_traces: bool = False, **facts) -> None:
        """Remove what an earlier run left, unless this one needs it; record options, inputs and `facts`."""
        (self.path / self.record).unlink(missing_ok=True)  # from here on, the old result is being replaced
        for trace in [] if keep_traces else self.find_traces():
            remove_folder(trace)
        for output in filter(Path.is_file, self._find(self.outputs)):
            output.unlink()
            if output.parent != self.path and not any(output.parent.iterdir()):
                output.parent.rmdir()
        name, key = self.noted_in
        inputs = {"inputs": self.inputs} if self.inputs else {}
        write_record(self.path / name, {"makes": self.what, key: self.options, **inputs, **facts})

    def write_run_config(self, started: float) -> dict:
        """Write and return `run_config.json` at the end of a run; `started` is the `time.time()` at its start."""
        return write_run_config(self.path, self.options, started, makes=self.what, inputs=dict(self.inputs))

    @contextmanager
    def working(self, command: str) -> Iterator[None]:
        """Say how to resume if a signal ends the block or the folder cannot be written; `command` started the run."""

        def advise() -> str:
            go_on, kept, resume = command, "nothing is kept yet", " --resume_from_checkpoint latest"
            if traces := self.find_traces():
                kept = f"{traces[-1].name} is kept"
                go_on += resume if resume not in command else ""
                go_on = without_overwrite_flag(go_on) if self.overwrite else go_on
            return f"{kept}; resume with: {go_on}"

        with report_how_to_resume(self.path, advise):
            yield

    def check_unchanged(self, identify: Callable[[], Mapping[str, str]]) -> None:
        """Check at the end of a run that `identify` still returns the inputs that the run started with.

        Raises:
            UserError: they changed during the run, so that the result belongs to neither.
        """
        try:
            now = identify()
        except UserError as error:  # removed or unreachable: no reason to lose the result
            warn_once(f"Warning: could not check whether the inputs changed during the run: {error}")
            return
        if changed := self._describe_changes(self.inputs, now):
            raise UserError(
                f"--output_dir {self.path}: not finished, as the inputs changed while they were read "
                f"({'; '.join(changed)}); start from scratch with --overwrite_output_dir."
            )

    def finish(self, record: dict) -> None:
        """Write the record that marks the run as finished."""
        write_record(self.path / self.record, record)

    def differing_options(self) -> list[str]:
        """Return 'name was value, now value' for each changed option that affects the result."""
        name, key = self.noted_in
        noted = read_record(self.path / name)
        # the name of an input may change if its contents are compared
        free = self.free | REVISIONS | set(noted["inputs"]) if "inputs" in noted else self.free
        return differing_options(noted[key], self.options, free)

    def differing_inputs(self) -> list[str]:
        """Return '--flag value was ..., now ...' for each changed input, as far as inputs were recorded."""
        noted = read_record(self.path / self.noted_in[0])
        return self._describe_changes(noted.get("inputs", self.inputs), self.inputs)

    def _describe_changes(self, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
        return [
            f"--{name} {self.options.get(name, '')}".rstrip() + f" was {before.get(name)}, now {now.get(name)}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]

    def _warn_about_unknown_inputs(self) -> None:
        if self.inputs and "inputs" not in read_record(self.path / self.noted_in[0]):
            warn_once(
                f"{self.path}: was started by an earlier version, which did not record the contents of its inputs: "
                "they may have changed since."
            )


def remove_folder(path: Path) -> None:
    """Remove a folder, or a link to one; after a kill, no partial folder remains under its name."""
    if path.is_symlink():
        path.unlink()
        return
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def check_writable(folder: Path) -> None:
    """Check that a folder is writable, with a temporary file in it or in its nearest existing parent.

    Raises:
        UserError: it is not.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {folder}: {nearest} is a file; choose a folder.")
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: {nearest} cannot be written ({error.strerror}); choose another folder."
        ) from None


def _revision_hint(changed: list[str]) -> str:
    has_commit = any("commit" in line for line in changed)
    return "; or pin the earlier commit with the flag that ends in revision" if has_commit else ""
