"""The verdicts of reviewers in `review.json`: each one is on disk before it counts as given."""

import json
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from utils.cli.errors import UserError
from utils.cli.records import SCHEMA_VERSION, read_record, write_text
from utils.data.left_out import ACCEPT, REJECT, REVIEW, Key

Verdicts = dict[str, dict[str, dict[str, dict]]]  # class -> class_index -> reviewer -> {"verdict", "time"}


class Review:
    """The verdicts on a set, and the answers of the blind mode.

    Several processes may write the same file: each change is made to what is on disk, under a lock. The text of every
    class is kept, because a set may have 100,000 verdicts and one more must be on disk in a fraction of a second.
    """

    def __init__(self, folder: Path, fingerprint: str):
        """Read the verdicts that are there.

        Raises:
            UserError: they are about other images, or the file is not a review.
        """
        self.path = folder / REVIEW
        self.fingerprint = fingerprint
        self.verdicts: Verdicts = {}
        self.blind: dict[str, dict[str, dict]] = {}  # reviewer -> image -> answer
        self._texts: dict[str, str] = {}
        self._stamp: tuple | None = None
        self._given: dict[str, list[list[tuple[Key, str | None]]]] = {}  # reviewer -> changes, for undo
        self._thread_lock = threading.RLock()
        self._file_lock = FileLock(folder / f".{REVIEW}.lock")
        self.reload()

    def reload(self) -> None:
        """Read the file if another process has changed it."""
        stamp = self._read_stamp()
        if stamp == self._stamp:
            return
        record = {"fingerprint": self.fingerprint, "verdicts": {}} if stamp is None else read_record(self.path)
        if record.get("fingerprint") != self.fingerprint:
            raise UserError(f"{self.path}: is about other images, of a set with other settings; move it away.")
        self.verdicts, self.blind = record["verdicts"], record.get("blind", {})
        self._texts, self._stamp = {}, stamp

    def verdict(self, key: Key, reviewer: str) -> str | None:
        """Return what a reviewer said of an image: accept, reject, or None."""
        given = self.verdicts.get(key[0], {}).get(str(key[1]), {}).get(reviewer)
        return given and given["verdict"]

    def give(self, keys: Iterable[Key], verdict: str | None, reviewer: str) -> None:
        """Save one verdict on some images; None takes back what the reviewer said. `undo` takes back the call.

        Raises:
            ValueError: an unknown verdict.
            OSError: the file cannot be written; nothing has changed.
        """
        if verdict not in (ACCEPT, REJECT, None):
            raise ValueError(f"unknown verdict {verdict!r}")
        with self._thread_lock:
            before = self._change(dict.fromkeys(keys, verdict), reviewer)
            self._given.setdefault(reviewer, []).append(before)

    def undo(self, reviewer: str) -> list[Key]:
        """Restore what was said before the reviewer's last `give` of this process; return the images of that call."""
        with self._thread_lock:
            given = self._given.get(reviewer)
            if not given:
                return []
            self._change(dict(given[-1]), reviewer)
            return [key for key, _ in given.pop()]

    def answer(self, image: str, answer: dict, reviewer: str) -> None:
        """Save an answer of the blind mode; `image` tells it from others."""
        with self._thread_lock, self._file_lock:
            self.reload()
            self.blind.setdefault(reviewer, {})[image] = answer | {"time": _now()}
            self._save()

    def _change(self, wanted: dict[Key, str | None], reviewer: str) -> list[tuple[Key, str | None]]:
        """Save verdicts by image; return those that were there before."""
        with self._file_lock:
            self.reload()
            before = [(key, self.verdict(key, reviewer)) for key in wanted]
            time = _now()
            for (name, index), verdict in wanted.items():
                of_class = self.verdicts.setdefault(name, {})
                of_image = of_class.setdefault(str(index), {})
                if verdict is None:
                    of_image.pop(reviewer, None)
                else:
                    of_image[reviewer] = {"verdict": verdict, "time": time}
                if not of_image:
                    del of_class[str(index)]
                self._texts.pop(name, None)
            self._save()
        return before

    def _save(self) -> None:
        for name in self.verdicts.keys() - self._texts.keys():
            lines = (f"{json.dumps(index)}: {json.dumps(given)}" for index, given in self.verdicts[name].items())
            self._texts[name] = f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}"
        head = {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint}
        head |= {"blind": self.blind} if self.blind else {}
        classes = ",\n".join(self._texts[name] for name in self.verdicts if self.verdicts[name])
        try:
            write_text(self.path, f'{json.dumps(head)[:-1]}, "verdicts": {{\n{classes}\n}}}}\n')
        except OSError:
            self._stamp = ()  # what is in memory is not what is on disk
            self.reload()
            raise
        self._stamp = self._read_stamp()

    def _read_stamp(self) -> tuple | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
