"""The folder of a run: new, begun, or finished; with which options and inputs, and whether this run may go on in it."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from utils.cli.errors import UserError, saying_how_to_go_on
from utils.cli.options import REVISIONS, differing_options
from utils.cli.processes import keeping_output, warn_once
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

# checkpoint-<step>, the earliest first, and nothing of somebody's own such as checkpoint-best
CHECKPOINTS = tuple("checkpoint-" + "[0-9]" * num_digits for num_digits in range(1, 10))
# whose folders they are
MADE = {
    DSI_CONFIG: "a style token", GENERATION_CONFIG: "a synthetic set", BRIDGED_CONFIG: "a classifier",
    COMPARISON: "a comparison",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """A folder in which a run with `options` (as JSON holds them) makes `what`, for messages such as 'a classifier'.

    `record` is the file that is written last: where it is, the run is finished. `noted_in` are the file, written first,
    and the key in it that hold the options of the run that began here. `traces` are patterns of what an unfinished run
    leaves, such as checkpoints, `outputs` of the files that a finished one leaves. `free` are the options on which the
    result does not depend. `inputs` maps options that name a dataset or a model to what tells its contents from others,
    as `Source.identity` returns it. With `overwrite` the run starts from scratch, whatever is there.
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
        """Whether the result is there. Such a run is not done again: the same command goes on with publishing.

        Raises:
            UserError: it is the result of a run with other options or inputs; or the folder is a file.
        """
        if self.path.is_file():
            raise UserError(f"--output_dir {self.path}: is a file; name a folder.")
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
                f"another folder or give --overwrite_output_dir{_how_to_pin(changed)}."
            )
        self._warn_of_unknown_inputs()
        return True

    def warn_of_new_start(self, resume: bool) -> None:
        """Say so where there is something to go on with, as `resume` asks, that `overwrite` takes away."""
        if resume and self.overwrite and self.find_traces():
            warn_once("--resume_from_checkpoint latest: without effect, --overwrite_output_dir starts from scratch.")

    def find_traces(self) -> list[Path]:
        """Return what an unfinished run has left, in the order of `traces`, those of a pattern by length and name."""
        return self._find(self.traces)

    def _find(self, patterns: tuple[str, ...]) -> list[Path]:
        found = [sorted(self.path.glob(pattern), key=lambda path: (len(path.name), path.name)) for pattern in patterns]
        return [path for paths in found for path in paths]

    def is_resumable(self, resume: bool) -> bool:
        """Return whether an unfinished run with these options is there, and `resume` asks to go on with it.

        Raises:
            UserError: it has other options; or it is there, and a new run would bury it.
        """
        traces = self.find_traces()
        if self.overwrite or not traces:
            self.warn_of_new_start(resume)
            return False
        if not resume:
            raise UserError(
                f"--output_dir {self.path}: holds {traces[-1].name} of an unfinished run; give "
                "--resume_from_checkpoint latest to go on, or --overwrite_output_dir to start from scratch."
            )
        self.check_options()
        self._warn_of_unknown_inputs()
        return True

    @property
    def is_begun(self) -> bool:
        """Whether a run that makes such a thing has noted its options here."""
        name, key = self.noted_in
        if not (self.path / name).exists():
            return False
        noted = read_record(self.path / name)
        return key in noted and noted.get("makes", self.what) == self.what

    def check_options(self) -> None:
        """Check that the run that began here had these options and inputs.

        Raises:
            UserError: it had others.
        """
        if differing := self.differing_options():
            raise UserError(
                f"--resume_from_checkpoint latest: {self.path} was begun with other options ({'; '.join(differing)}); "
                "give the same, or start from scratch with --overwrite_output_dir."
            )
        self.check_inputs()

    def check_inputs(self) -> None:
        """Check that the run that began here had these inputs, as far as it noted them.

        Raises:
            UserError: their contents were others.
        """
        if changed := self.differing_inputs():
            raise UserError(
                f"--resume_from_checkpoint latest: {self.path} was begun with other inputs ({'; '.join(changed)}); "
                "start from scratch with --overwrite_output_dir, or in another --output_dir"
                f"{_how_to_pin(changed)}."
            )

    def check_writable(self) -> None:
        """Check, before any work, that the folder can be made and written, and that none of the outputs is foreign.

        Raises:
            UserError: it cannot be written; it is the folder of another script; or it holds a file that this run would
                write, and no run has made.
        """
        check_writable(self.path)
        for name, what in MADE.items():
            if what != self.what and (self.path / name).exists():
                raise UserError(f"--output_dir {self.path}: holds {what} ({name}); name another folder.")
        if self.is_begun or self.find_traces():
            return
        if foreign := next(iter(self._find(self.outputs)), None):
            raise UserError(
                f"--output_dir {self.path}: holds {foreign.relative_to(self.path)}, which would be overwritten, and is "
                f"not the folder of {self.what}; name another folder."
            )

    def begin(self, keep_traces: bool = False, **facts) -> None:
        """Remove what an earlier run left, if this one does not need it; note options, inputs and `facts`."""
        (self.path / self.record).unlink(missing_ok=True)  # from here on, what is there is being replaced
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
        """Write `run_config.json` at the end of a run that began at the `time.time()` of `started`; return it."""
        return write_run_config(self.path, self.options, started, makes=self.what, inputs=dict(self.inputs))

    @contextmanager
    def working(self, command: str) -> Iterator[None]:
        """Say how to go on where a signal ends the block, or the folder cannot be written; `command` began the run."""

        def advise() -> str:
            go_on, kept, resume = command, "nothing is kept yet", " --resume_from_checkpoint latest"
            if traces := self.find_traces():
                kept = f"{traces[-1].name} is kept"
                go_on += resume if resume not in command else ""
                go_on = keeping_output(go_on) if self.overwrite else go_on
            return f"{kept}; go on with: {go_on}"

        with saying_how_to_go_on(self.path, advise):
            yield

    def check_unchanged(self, identify: Callable[[], Mapping[str, str]]) -> None:
        """Check at the end of a run that its inputs, which `identify` looks at again, are those that it began with.

        Raises:
            UserError: they have changed meanwhile, so that the result is of neither.
        """
        try:
            now = identify()
        except UserError as error:  # removed, or out of reach: no reason to lose the result
            warn_once(f"Warning: whether the inputs have changed during the run cannot be checked: {error}")
            return
        if changed := self._describe_changes(self.inputs, now):
            raise UserError(
                f"--output_dir {self.path}: not finished, the inputs have changed while they were read "
                f"({'; '.join(changed)}); start from scratch with --overwrite_output_dir."
            )

    def finish(self, record: dict) -> None:
        """Write the record whose presence says that all is there."""
        write_record(self.path / self.record, record)

    def differing_options(self) -> list[str]:
        """Return 'name was value, now value' for each option that another result depends on."""
        name, key = self.noted_in
        noted = read_record(self.path / name)
        # what names an input may change where its contents are compared
        free = self.free | REVISIONS | set(noted["inputs"]) if "inputs" in noted else self.free
        return differing_options(noted[key], self.options, free)

    def differing_inputs(self) -> list[str]:
        """Return '--flag value was ..., now ...' for each input that was another, as far as that was noted."""
        noted = read_record(self.path / self.noted_in[0])
        return self._describe_changes(noted.get("inputs", self.inputs), self.inputs)

    def _describe_changes(self, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
        return [
            f"--{name} {self.options.get(name, '')}".rstrip() + f" was {before.get(name)}, now {now.get(name)}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]

    def _warn_of_unknown_inputs(self) -> None:
        if self.inputs and "inputs" not in read_record(self.path / self.noted_in[0]):
            warn_once(
                f"{self.path}: was begun by an earlier version, which did not note the contents of its inputs: whether "
                "they have changed since is not known."
            )


def remove_folder(path: Path) -> None:
    """Remove a folder, or a link to one, so that nobody takes what a kill leaves of it for the whole."""
    if path.is_symlink():
        path.unlink()
        return
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def check_writable(folder: Path) -> None:
    """Check that a folder can be made and written, by a file in it, or in the nearest one around it that is there.

    Raises:
        UserError: it cannot.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {folder}: {nearest} is a file; name a folder.")
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: {nearest} cannot be written ({error.strerror}); name another folder."
        ) from None


def _how_to_pin(changed: list[str]) -> str:
    return (
        "; a flag that ends in revision names the earlier commit" if any("commit" in line for line in changed) else ""
    )
