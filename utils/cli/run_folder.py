"""The folder of a run: new, begun, or finished; with which options, and whether this run may go on in it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.options import differing_options
from utils.cli.records import RUN_CONFIG, read_record, write_record

# checkpoint-<step>, the earliest first, and nothing of somebody's own such as checkpoint-best
CHECKPOINTS = tuple("checkpoint-" + "[0-9]" * num_digits for num_digits in range(1, 10))


@dataclass(frozen=True)
class RunFolder:
    """A folder in which a run with `options` (as JSON holds them) makes `what`, for messages such as 'a classifier'.

    `record` is the file that is written last: where it is, the run is finished. `noted_in` are the file, written first,
    and the key in it that hold the options of the run that began here. `traces` are patterns of what an unfinished run
    leaves, such as checkpoints. `free` are the options on which the result does not depend. With `overwrite` the run
    starts from scratch, whatever is there.
    """

    path: Path
    what: str
    options: dict
    record: str
    noted_in: tuple[str, str] = (RUN_CONFIG, "options")
    traces: tuple[str, ...] = ()
    free: frozenset[str] = frozenset()
    overwrite: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether the result is there. Such a run is not done again: the same command goes on with publishing.

        Raises:
            UserError: it is the result of a run with other options; or the folder is a file.
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
        return True

    def find_traces(self) -> list[Path]:
        """Return what an unfinished run has left, in the order of `traces`, those of a pattern by length and name."""
        found = [
            sorted(self.path.glob(pattern), key=lambda path: (len(path.name), path.name)) for pattern in self.traces
        ]
        return [path for paths in found for path in paths]

    def is_resumable(self, resume: bool) -> bool:
        """Return whether an unfinished run with these options is there, and `resume` asks to go on with it.

        Raises:
            UserError: it has other options; or it is there, and a new run would bury it.
        """
        traces = self.find_traces()
        if self.overwrite or not traces:
            return False
        if not resume:
            raise UserError(
                f"--output_dir {self.path}: holds {traces[-1].name} of an unfinished run; give "
                "--resume_from_checkpoint latest to go on, or --overwrite_output_dir to start from scratch."
            )
        self.check_options()
        return True

    @property
    def is_begun(self) -> bool:
        """Whether a run has noted its options here."""
        return (self.path / self.noted_in[0]).exists()

    def check_options(self) -> None:
        """Check that the run that began here had these options.

        Raises:
            UserError: it had others.
        """
        if differing := self.differing_options():
            raise UserError(
                f"--resume_from_checkpoint latest: {self.path} was begun with other options ({'; '.join(differing)}); "
                "give the same, or start from scratch with --overwrite_output_dir."
            )

    def begin(self, keep_traces: bool = False, **facts) -> None:
        """Remove what an earlier run has left, if this one does not need it; note the options, and `facts` beside."""
        (self.path / self.record).unlink(missing_ok=True)  # from here on, what is there is being replaced
        for trace in [] if keep_traces else self.find_traces():
            shutil.rmtree(trace)
        name, key = self.noted_in
        write_record(self.path / name, {key: self.options, **facts})

    def finish(self, record: dict) -> None:
        """Write the record whose presence says that all is there."""
        write_record(self.path / self.record, record)

    def differing_options(self) -> list[str]:
        """Return 'name was value, now value' for each option that another result depends on."""
        name, key = self.noted_in
        return differing_options(read_record(self.path / name)[key], self.options, self.free)
