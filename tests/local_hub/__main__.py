"""Run a Hub by hand: `make local-hub`, then paste the printed lines into another terminal. Ctrl-C ends it."""

import sys
import tempfile
import threading
from pathlib import Path

from tests.local_hub import LocalHub

PORT = 8765
TOKEN = "hf_local"
DEMO = Path(__file__).parents[2] / "demo"
DEMO_REPOSITORIES = {"fashion-mnist": ("user/fashion", "dataset"), "generator": ("user/generator", "model")}


def upload_demo(hub: LocalHub) -> list[str]:
    """Upload the demo's dataset and generator, if they exist, and print their addresses."""
    uploaded = []
    for folder_name, (repo_id, repo_type) in DEMO_REPOSITORIES.items():
        folder = DEMO / folder_name
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if files:
            hub.create_repo(repo_id, repo_type).commit(files, message=f"Upload demo/{folder_name}")
            uploaded.append(f"# {repo_type} {repo_id}, from demo/{folder_name}")
    return uploaded


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="local-hub-") as root:
        try:
            hub = LocalHub(Path(root), port=PORT)
        except OSError as error:
            sys.exit(f"port {PORT}: {error.strerror}; is a local Hub running already?")
        with hub:
            hub.add_user("user", TOKEN, role="write")
            # A separate cache: files from the real Hub must not answer for this one.
            settings = f"HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1 HF_HOME={root}/hf-home"
            print(f"export {settings}", *upload_demo(hub), "# Ctrl-C ends it.", sep="\n", flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                print()


if __name__ == "__main__":
    main()
