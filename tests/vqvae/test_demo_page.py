"""The page of `vqvae demo` as it is served: by gradio_client, and in a browser where one is installed."""

import contextlib
import gc
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
from demo_worlds import ROOT, dropped, run_in, served

from vqvae.cli import main

pytest.importorskip("gradio", reason="extra `demo`")

# gradio_client leaves event loops and sockets open, which are collected in whichever test comes later.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("page")
    folder = run_in(scratch / "run")
    with served(scratch, folder, "--any-order", folder.parent / "any-order", "--data", "fashion-mini") as found:
        yield found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        time.sleep(1)  # for the threads of clients to end
        gc.collect()


@contextlib.contextmanager
def client_of(address, folder):
    """A client, all of whose event loops and sockets are gone after it; it leaves some of them open."""
    from gradio_client import Client

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = Client(address, verbose=False, download_files=folder, analytics_enabled=False)
        try:
            yield found
        finally:
            found.close()
            del found
            gc.collect()


@pytest.fixture
def client(page, tmp_path):
    with client_of(page[0], tmp_path / "downloads") as found:
        yield found


def refused(client, *args, api_name):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as found:
        client.predict(*args, api_name=api_name)
    return str(found.value)


def test_every_function_can_be_called_by_a_client(client, tmp_path):
    from gradio_client import handle_file

    good = handle_file(str(dropped(tmp_path)["good.png"]))
    *pictures, words = client.predict(good, True, api_name="/reconstruct")
    assert len(pictures) == 5
    assert "PSNR" in words
    images, codes = client.predict("1", 5, 3, 0.9, 1, 0, 1, False, 4, api_name="/sample")
    assert len(images) == 5
    assert np.load(codes).shape == (5, 4, 4)
    again = client.predict("1", 5, 3, 0.9, 1, 0, 1, False, 4, api_name="/sample")[1]
    assert (np.load(codes) == np.load(again)).all()
    file, table, _ = client.predict(good, False, api_name="/compress")
    assert "| PNG |" in table
    assert "equal to the last bit" in table
    assert len(client.predict(handle_file(file), api_name="/decompress")) == 1
    assert "the same bytes" in client.predict("some words", 1, api_name="/dream")[1]
    assert client.predict(3, api_name="/code")[2].startswith("Code 3 stands")
    assert client.predict(api_name="/atlas")
    value = {"background": good, "layers": [], "composite": None}
    assert "nothing is painted" in refused(client, value, "any", 2, 0, api_name="/inpaint")


def test_bad_input_is_told_in_words_and_the_page_lives_on(client, page, tmp_path):
    from gradio_client import handle_file

    files = dropped(tmp_path)
    said = {
        "text.png": "known format",
        "huge.png": "more than 50 million pixels",
        "line.png": "a line",
        "empty.png": "empty",
    }
    for name, words in said.items():
        for api_name in ("/reconstruct", "/compress"):
            line = refused(client, handle_file(str(files[name])), True, api_name=api_name)
            assert words in line
            assert "Traceback" not in line
        value = {"background": handle_file(str(files[name])), "layers": [], "composite": None}
        assert words in refused(client, value, "any", 1, 0, api_name="/inpaint")
    moving = client.predict(handle_file(str(files["moving.gif"])), True, api_name="/reconstruct")
    assert "PSNR" in moving[-1]
    assert "not in the list of choices" in refused(client, "nothing", 4, api_name="/sample")
    assert page[1].poll() is None


def test_two_users_at_once_have_each_their_own(page, tmp_path):
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def use(user: int) -> None:
        for _ in range(3):
            codes = clients[user].predict("1", 6, user, 1, 1, 0, 1, False, 4, api_name="/sample")[1]
            found[user].append(np.load(codes))

    users = [threading.Thread(target=use, args=(user,)) for user in found]
    with client_of(page[0], tmp_path / "0") as first, client_of(page[0], tmp_path / "1") as second:
        clients = [first, second]
        for each in users:
            each.start()
        for each in users:
            each.join()
        del first, second, clients
    for grids in found.values():
        assert len(grids) == 3
        assert all((grid == grids[0]).all() for grid in grids)
    assert (found[0][0] != found[1][0]).any()


def test_files_of_this_machine_are_not_served_and_none_is_left_elsewhere(page):
    address, _, home = page
    outside = Path(__file__).resolve()
    for url in (f"{address}gradio_api/file={outside}", f"{address}gradio_api/file=/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(url)
        assert found.value.code in (403, 404)
    left = [path for path in home.rglob("*") if path.is_file() and home / "tmp" not in path.parents]
    assert not [path for path in left if "matplotlib" not in str(path)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_page_ends_by_a_signal_and_leaves_no_file(tmp_path, how):
    folder = run_in(tmp_path / "run")
    with served(tmp_path, folder) as (_, process, home):
        assert any((home / "tmp").iterdir())
        process.send_signal(how)
        assert process.wait(timeout=60) in (0, 130)
        assert "Traceback" not in process.stderr.read()
        assert not [path for path in (home / "tmp").iterdir() if path.name.startswith("vqvae-demo-")]


def test_a_port_that_is_taken_and_a_model_that_is_not_there_are_one_line(page, tmp_path, monkeypatch, capsys):
    folder = run_in(tmp_path / "run")
    for words, said in (
        (("fashion-82",), "perhaps you meant fashion-28"),
        ((folder, "--port", "0"), "--port must lie in [1, 65535]"),
        ((folder, "--any-order", tmp_path / "nothing"), "no model folder at"),
    ):
        monkeypatch.setattr(sys, "argv", ["vqvae", "demo", *map(str, words)])
        with pytest.raises(SystemExit) as found:
            main()
        assert found.value.code == 2
        check_line(capsys.readouterr().err, said)
    port = page[0].rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "vqvae", "demo", str(folder), "--port", port]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 2
    check_line(again.stderr, f"port {port}: it is taken")


def check_line(errors: str, said: str) -> None:
    """One line that says it."""
    assert said in errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1


@pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="needs chromium and chromedriver (Debian's packages chromium and chromium-driver)",
)
@pytest.mark.parametrize("width", [420, 1300])
def test_every_tab_in_a_browser(page, tmp_path, width):
    """By clicks and a file: each button shows what it is to show, and nothing is wider than the window."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},1400"):
        options.add_argument(word)
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_window_size(width, 1400)

    def seen(selector: str):
        return [each for each in driver.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()]

    def wait(what) -> None:
        end = time.monotonic() + 60
        while not what():
            assert time.monotonic() < end, seen("body")[0].text
            time.sleep(0.2)

    def click(selector: str) -> None:
        wait(lambda: seen(selector))
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", seen(selector)[0])
        time.sleep(0.3)
        seen(selector)[0].click()

    def tab(name: str) -> None:
        found = [each for each in seen("button[role=tab]") if each.text == name]
        if not found:
            click(".overflow-menu > button")
            wait(lambda: [each for each in seen(".overflow-dropdown button") if each.text == name])
            found = [each for each in seen(".overflow-dropdown button") if each.text == name]
        found[0].click()
        time.sleep(0.5)
        across = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert across <= 1, f"{name} is {across} pixels wider than the window"

    def example() -> None:
        click(".gallery-item, tr.tr-body")
        time.sleep(1)

    def shows(selector: str, text: str) -> None:
        wait(lambda: seen(selector) and text in seen(selector)[0].text)

    try:
        driver.get(page[0])
        wait(lambda: seen("#reconstruct"))
        driver.find_elements(By.CSS_SELECTOR, "input[type=file]")[0].send_keys(str(dropped(tmp_path)["good.png"]))
        wait(lambda: seen(".image-frame img"))
        click("#reconstruct")
        shows("#reconstruct-figures", "PSNR")
        tab("Sample")
        example()
        click("#sample")
        wait(lambda: len(seen("#samples img")) >= 8)
        tab("Inpaint")
        example()
        click("#inpaint")
        wait(lambda: len(seen("#answers img")) >= 4)
        tab("Compress")
        example()
        click("#compress")
        shows("#compress-figures", "equal to the last bit")
        click("#decompress")
        wait(lambda: seen("#decompressed img"))
        tab("Dream")
        example()
        click("#dream")
        shows("#dream-figures", "the same bytes")
        tab("Codebook")
        example()
        click("#open")
        click("#clickable img")
        shows("#place", "Row ")
        before = seen("#place")[0].text
        field = seen("#code input")[0]
        field.clear()
        field.send_keys("5")
        click("#exchange")
        wait(lambda: "code 5," in seen("#place")[0].text)
        assert before
        click("#show")
        shows("#code-figures", "Code 5 stands")
        click("#atlas-button")
        wait(lambda: seen("#atlas img"))
        tab("Reconstruct")
        driver.save_screenshot(str(tmp_path / "page.png"))
        assert not seen(".toast-body.error")
    finally:
        driver.quit()
