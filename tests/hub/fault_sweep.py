"""Publish a folder without faults, then once for each request and fault; print the results as JSON.

    python -m tests.hub.fault_sweep set|model WORK_DIR

It is a separate process because the client reads HF_ENDPOINT on import. Only the pauses between tries are shortened.
"""

import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from tests.local_hub import Fault, LocalHub

USER, TOKEN = "ann", "hf_sweep_secret"
FAULTS = {
    "status 503": {"kind": "status", "status": 503},
    "status 429": {"kind": "status", "status": 429, "retry_after": 0},
    "dropped connection": {"kind": "drop"},
    "truncated body": {"kind": "truncate"},
    "answer lost": {"kind": "lost_answer"},
    "delay": {"kind": "delay", "seconds": 0.2},
}
CARD = "---\nlicense: unknown\ntags:\n- bridged-transfer\n---\n\n# A card\n"
FOLDERS = {
    "set": {
        **{f"data/train-{number:05d}.parquet": b"shard %d" % number * 100 for number in range(3)},
        "generation_config.json": b"{}", "README.md": CARD.encode(),
    },
    "model": {"model.safetensors": b"weights" * 100, "config.json": b"{}", "README.md": CARD.encode()},
}  # fmt: skip
LEFT_OUT = {"training_args.bin": TOKEN.encode(), "checkpoint-3/optimizer.pt": b"state", "logs/events": b"log"}
PATTERNS = ("data/train-*.parquet", "*.safetensors", "*.json", "README.md")


def write_folder(folder: Path, content: dict[str, bytes], mark: str) -> Path:
    """Write files that are new to the Hub: `mark` makes binary files differ between folders."""
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if name.endswith((".md", ".json")) else data + mark.encode())
    return folder


def publish(folder: Path, repo_name: str, repo_type: str) -> None:
    from utils.hub.publishing import publish_folder
    from utils.hub.targets import open_target

    publish_folder(folder, open_target(folder, repo_name, repo_type, token=TOKEN), PATTERNS)


def requests_of(hub: LocalHub, repo_name: str) -> list[tuple[str, str, int]]:
    """Return method, path (a pattern for any repository and blob) and the number of earlier occurrences."""
    seen, requests = Counter(), []
    for request in hub.log:
        pattern = re.escape(request.path).replace(re.escape(repo_name), r"[\w-]+")
        key = request.method, re.sub(r"[0-9a-f]{40,64}", "[0-9a-f]{40,64}", pattern)
        requests.append((*key, seen[key]))
        seen[key] += 1
    return requests


def sweep(kind: str, hub: LocalHub, work_dir: Path) -> dict:
    """Return the number of faults by kind, and the problems, if any."""
    repo_type = "dataset" if kind == "set" else "model"
    folder = write_folder(work_dir / "clean", FOLDERS[kind] | LEFT_OUT, "clean")
    publish(folder, "clean", repo_type)
    requests = requests_of(hub, "clean")
    survived, problems, seconds = Counter(), [], time.time()
    for number, (method, path, skip) in enumerate(requests):
        for name, fault in FAULTS.items():
            repo_name = f"{kind}-{number}-{name.replace(' ', '-')}"
            folder = write_folder(work_dir / repo_name, FOLDERS[kind] | LEFT_OUT, repo_name)
            hub.clear_faults()
            hub.inject(Fault(method=method, path=f"^{path}$", skip=skip, **fault))
            try:
                publish(folder, repo_name, repo_type)
            except Exception as error:  # noqa: BLE001 - the test reports any exception
                problems.append(f"{name} at {method} {path} #{skip}: {type(error).__name__}: {error}"[:600])
                continue
            survived[name] += len(hub.faults_fired)
            problems += [
                f"{name} at {method} {path} #{skip}: {text}" for text in differences(hub, folder, repo_name, kind)
            ]
    return {
        "requests": [f"{method} {path} #{skip}" for method, path, skip in requests],
        "survived": survived,
        "problems": problems,
        "seconds": round(time.time() - seconds, 1),
    }


def differences(hub: LocalHub, folder: Path, repo_name: str, kind: str) -> list[str]:
    """Return how a repository differs from the expected one: files, their contents, duplicate commits."""
    repo = hub.repo(f"{USER}/{repo_name}", "dataset" if kind == "set" else "model")
    there = {path: data for path, data in repo.files().items() if path != ".gitattributes"}
    wanted = {name: (folder / name).read_bytes() for name in FOLDERS[kind]}
    found = [f"{path} differs" for path in wanted if there.get(path) != wanted[path]]
    found += [f"{path} does not belong there" for path in set(there) - set(wanted)]
    num_commits = len([commit for commit in repo.commits() if commit.title != "initial commit"])
    return found + ([f"{num_commits} commits"] if num_commits != 1 else [])


def main(kind: str, work_dir: Path) -> None:
    with LocalHub(work_dir / "hub") as hub:
        hub.add_user(USER, TOKEN)
        os.environ.update(hub.environment(work_dir / "hf-home"))
        os.environ.pop("HF_HUB_OFFLINE", None)
        from huggingface_hub.utils import _http

        from utils.hub import targets

        targets.LONGEST_PAUSE = 0.01
        _http.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.01))
        result = sweep(kind, hub, work_dir / "folders")
        result["server_failures"] = hub.failures
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
