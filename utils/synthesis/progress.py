"""One progress bar for all processes: each leaves its count in a file of the shared folder, the main one adds up."""

import time
from pathlib import Path

from tqdm.auto import tqdm

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_AT_THE_END = 0.1


class SharedProgress:
    """A bar on the main process over what all processes have drawn."""

    def __init__(self, folder: Path, process_index: int, num_processes: int, total: int):
        self.folder = folder
        self.process_index = process_index
        self.num_processes = num_processes
        self.num_done = 0
        self._looked_at = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._path(process_index).unlink(missing_ok=True)  # of an earlier run
        self.bar = tqdm(total=total, desc="synthetic images", unit="image", disable=process_index != 0)

    def update(self, count: int) -> None:
        """Add images that this process has drawn."""
        self.num_done += count
        if time.monotonic() - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return
        self._looked_at = time.monotonic()
        self._show()

    def finish(self) -> None:
        """Say that this process has done its share; the main one shows the others' until they have done theirs."""
        self._show()
        while self.process_index == 0 and self.bar.n < self.bar.total:
            time.sleep(SECONDS_AT_THE_END)
            self._show()
        self.bar.close()

    def _show(self) -> None:
        if self.process_index != 0:
            self._path(self.process_index).write_text(str(self.num_done))
            return
        others = [self._path(index) for index in range(1, self.num_processes)]
        # a count is empty while it is written
        counts = [int(path.read_text() or 0) for path in others if path.exists()]
        self.bar.update(max(self.num_done + sum(counts) - self.bar.n, 0))

    def _path(self, process_index: int) -> Path:
        return self.folder / f"drawn-{process_index}"
