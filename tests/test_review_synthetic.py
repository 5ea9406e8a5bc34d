"""review_synthetic.py: summary, refusals, and the page in a real browser where Gradio and Chromium are installed."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from review_synthetic import AUTH, main
from tests.review.builders import FINGERPRINT, save_scores, save_set
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, write_record
from utils.review.verdicts import Review

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="Gradio is not installed (requirements-review.txt)"
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="no Chromium, or playwright is not installed",
)


@pytest.fixture
def folder(tmp_path, real_images_dir):
    return save_set(tmp_path / "syn", real_dir=real_images_dir)


def run(folder, *flags) -> dict:
    return main(["--synthetic_dataset", str(folder), *flags])


def test_the_summary_needs_no_page_and_writes_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    summary = run(folder, "--summary")
    assert summary["rows"][0] == ["red_square", "10", "0", "0"]
    assert sorted(folder.iterdir()) == before
    review = Review(folder, FINGERPRINT)
    review.give([("red_square", index) for index in range(10)], "reject", "anna")
    review.give([("red_square", 0)], "accept", "ben")
    assert run(folder, "--summary", "--sample", "5")["rows"][0][:3] == ["red_square", "5", "5"]
    printed = capsys.readouterr().out
    assert "rejected: 9." not in printed and "accepted (95 % interval)" in printed
    assert "agreement on the 1 images of all: Cohen's kappa 0.00." in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--synthetic_dataset", "user/cars-syn"], "hf download user/cars-syn --repo-type dataset"),
        ([], "--synthetic_dataset is missing"),
        (["--sample", "0"], "--sample 0: must be above 0"),
        (["--port", "99999"], "--port 99999: must be from 1 to 65535"),
        (["--summary", "--reviewer", "anna"], "--reviewer anna: does nothing with --summary"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(flags)


def test_without_gradio_one_line_says_what_to_install(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find_spec(name))
    with pytest.raises(UserError, match=r"pip install -r requirements-review.txt"):
        run(folder)


@pytest.mark.parametrize(
    ("flags", "login", "message"),
    [
        (["--share"], None, "--share: others can open the page; set BRIDGED_REVIEW_AUTH=user:password"),
        (["--host", "0.0.0.0"], None, "--host 0.0.0.0: others can open the page"),
        ([], "only-a-user", "BRIDGED_REVIEW_AUTH: must be user:password."),
    ],
)
def test_a_page_that_others_can_open_needs_a_login_which_no_message_repeats(folder, monkeypatch, flags, login, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv(AUTH, raising=False)
    if login:
        monkeypatch.setenv(AUTH, login)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run(folder, *flags)
    assert "only-a-user" not in str(error.value)


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="has no generation_config.json"):
        run(tmp_path, "--summary")
    write_record(folder / GENERATION_CONFIG, {"class_names": []})
    with pytest.raises(UserError, match="of an old version"):
        run(folder, "--summary")


@contextmanager
def served(folder, *flags, **environment):
    """Serve a set's page in a process of its own; yield its address, then end it by Ctrl-C."""
    command = [sys.executable, "review_synthetic.py", "--synthetic_dataset", str(folder), "--reviewer", "anna", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if found := re.search(r"Review page: (\S+)", line):
                yield found[1], process
                break
        else:
            pytest.fail(f"no page: {printed}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@contextmanager
def browser_page(address):
    """Open an address; yield the page and the addresses that it asked for. Its own errors fail the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, asked, errors = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".tile img", timeout=60_000)
        yield page, asked
        browser.close()
        assert errors == []


def verdicts(folder) -> dict[tuple[str, str], str]:
    record = json.loads((folder / "review.json").read_text())
    return {
        (name, index): given["anna"]["verdict"]
        for name, of_class in record["verdicts"].items()
        for index, given in of_class.items()
    }


def wait_until(condition, seconds: float = 10) -> None:
    ended = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ended, "waited in vain"
        time.sleep(0.02)


@needs_gradio
def test_the_page_serves_no_file_and_takes_none_and_ends_by_ctrl_c(folder):
    with served(folder, GRADIO_ALLOWED_PATHS="/") as (address, process):
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as answer:
            assert answer.status == 200
        for path in (folder / GENERATION_CONFIG, ROOT / "README.md", "/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}gradio_api/file={path}")
            assert refused.value.code == 403
        boundary = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\nmany bytes\r\n--b--\r\n'
        upload = urllib.request.Request(
            f"{address}gradio_api/upload", boundary, {"Content-Type": "multipart/form-data; boundary=b"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(upload)
        assert refused.value.code == 413
    assert process.returncode == 0


@needs_gradio
def test_with_a_login_nothing_is_served_without_it(folder):
    with served(folder, **{AUTH: "anna:s3cret"}) as (address, _):
        call = urllib.request.Request(
            f"{address}gradio_api/component_server",
            json.dumps({"data": {}, "component_id": 1, "fn_name": "overview", "session_hash": "x"}).encode(),
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(call)
        assert refused.value.code == 401


@needs_gradio
@needs_browser
def test_review_by_key_and_by_click_is_shown_and_saved_at_once_and_survives_a_reload(folder):
    with served(folder, "--page_size", "4") as (address, _), browser_page(address) as (page, asked):
        page.keyboard.press("x")
        assert "reject" in page.get_attribute(".tile >> nth=0", "class")  # before any answer of the server
        page.keyboard.press("a")
        page.keyboard.press("ArrowRight")
        page.click(".tile >> nth=3")
        expected = {("red_square", "0"): "reject", ("red_square", "1"): "accept", ("red_square", "3"): "reject"}
        wait_until(lambda: (folder / "review.json").exists() and verdicts(folder) == expected)
        page.keyboard.press("Enter")  # accepts the one that is left
        wait_until(lambda: verdicts(folder) == expected | {("red_square", "2"): "accept"})
        page.keyboard.press("u")
        wait_until(lambda: verdicts(folder) == expected)
        page.wait_for_function("() => document.querySelector('.class .count').textContent === '3 / 10'")
        page.reload()
        page.wait_for_selector(".tile.reject")
        assert [page.get_attribute(f".tile >> nth={place}", "class").split()[1:] for place in range(4)] == [
            ["reject", "selected"], ["accept"], [], ["reject"],
        ]  # fmt: skip
        page.click(".tile >> nth=3")
        wait_until(lambda: verdicts(folder)["red_square", "3"] == "accept")
        assert all(url.startswith((address, "data:", "blob:")) for url in asked)  # nothing from elsewhere


@needs_gradio
@needs_browser
def test_space_turns_pages_on_to_the_next_class_and_images_with_low_scores_come_first(folder):
    save_scores(folder, {("red_square", 7): 0.1, ("red_square", 2): 0.2})
    with served(folder, "--page_size", "6") as (address, _), browser_page(address) as (page, _):
        titles = [page.get_attribute(f".tile >> nth={place}", "title") for place in range(3)]
        assert titles == ["red_square 7", "red_square 2", "red_square 0"]
        assert page.inner_text(".where") == "page 1 of 2, 10 images, lowest probe first"
        for where, name in (("page 2 of 2", "red_square"), ("page 1 of 2", "green circle")):
            page.keyboard.press(" ")
            page.wait_for_function(
                "([where, name]) => document.querySelector('.where').textContent.startsWith(where)"
                " && document.querySelector('.grid-view h2').textContent === name", arg=[where, name],
            )  # fmt: skip
        assert page.locator(".real img").count() == 2  # the shots of this class
        page.keyboard.press("Shift+ ")
        page.wait_for_function("() => document.querySelector('.grid-view h2').textContent === 'red_square'")


@needs_gradio
@needs_browser
def test_the_blind_test_asks_saves_and_sums_up(folder):
    with served(folder) as (address, _), browser_page(address) as (page, _):
        page.click(".to-blind")
        page.wait_for_selector(".blind-view:not([hidden])")
        page.keyboard.press("r")
        assert page.inner_text(".blind-where") == "choose a class first"
        for number, said in enumerate("rs", 1):
            page.keyboard.press("2")
            page.keyboard.press(said)
            page.wait_for_function(
                "number => document.querySelector('.blind-where').textContent === `${number} of 30 answered`",
                arg=number,
            )
        page.click(".to-summary")
        page.wait_for_selector(".summary-table td")
        assert "Blind test: class recognised on real images" in page.inner_text(".summary-lines")
    saved = json.loads((folder / "review.json").read_text())["blind"]["anna"].values()
    assert [answer["said_class"] for answer in saved] == ["green circle"] * 2
    assert [answer["said_real"] for answer in saved] == [True, False]


@needs_gradio
@needs_browser
def test_a_verdict_that_cannot_be_saved_is_taken_back_and_told(folder):
    with served(folder) as (address, process), browser_page(address) as (page, _):
        process.kill()
        process.wait()
        page.keyboard.press("x")
        page.wait_for_selector(".error:not([hidden])")
        assert "reject" not in page.get_attribute(".tile >> nth=0", "class")


@needs_gradio
@needs_browser
def test_a_set_of_50_000_images_is_paged_without_waiting(tmp_path):
    folder = save_set(tmp_path / "large", num_per_class=16_667, images_per_shard=10_000, rows_per_group=100)
    with served(folder) as (address, _), browser_page(address) as (page, _):
        began = time.monotonic()
        for number in range(2, 22):
            page.keyboard.press(" ")
            page.wait_for_function(
                "where => document.querySelector('.where').textContent.startsWith(where)", arg=f"page {number} of 695"
            )
        assert (time.monotonic() - began) / 20 < 1  # 0.05 s on two free cores
        page.keyboard.press("x")
        wait_until(lambda: (folder / "review.json").exists())
        assert verdicts(folder) == {("red_square", "480"): "reject"}
