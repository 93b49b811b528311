"""TensorBoard's page in a real browser: whether the markers are there for whoever looks."""

import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing

import numpy as np
import pytest

from groktrace.reporting.tensorboard import COLOURS, TensorBoardReporter

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture
def page():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium found")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser.new_page(viewport={"width": 1500, "height": 1100})
        finally:
            browser.close()


@pytest.fixture
def serve(tmp_path):
    """A function from a log folder to the address of a TensorBoard that has read it."""
    started = []

    def start(folder, events):
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
        with open(tmp_path / "server.log", "w") as log:
            started.append(subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log))
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{address}data/runs", timeout=5) as reply:
                    if reply.read().count(b'"') >= 2 * events:
                        return address
            except OSError:
                pass
            time.sleep(0.3)
        raise TimeoutError((tmp_path / "server.log").read_text())

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


def test_the_markers_are_on_the_page(grokked, tmp_path, page, serve):
    from matplotlib import image as matplotlib_image

    transitions = grokked[1].transitions
    logs = tmp_path / "logs"
    TensorBoardReporter("logs").report(*grokked, tmp_path)
    names = sorted(path.name for path in logs.iterdir())
    page.goto(serve(logs, len(names)) + COLOURS + "#timeseries")
    page.get_by_text("grokking/llc").first.wait_for(timeout=60_000)
    cards = [card.replace("\n", "") for card in page.locator("card-view").all_inner_texts()]
    assert cards[0].startswith("grokking/llc")
    assert cards[1].startswith("grokking/val_accuracy")
    fall = transitions[1]
    assert names[2] == f"transition 2: generalisation @ {fall.step} [{fall.step_low}, {fall.step_high}]"
    for name in names:
        page.get_by_text(name, exact=True).first.wait_for(timeout=30_000)
    for tag in ("grokking/llc", "grokking/val_accuracy"):
        chart = page.locator("card-view").filter(has_text=tag).first.locator("line-chart").first
        chart.scroll_into_view_if_needed()
        page.wait_for_timeout(2000)
        pixels = matplotlib_image.imread(io.BytesIO(chart.screenshot()))[..., :3]
        # Strongly coloured upright lines that fill most of the chart's height: neither grid (grey) nor curve is one.
        vivid = np.ptp(pixels, axis=2) > 0.35
        tall = np.flatnonzero(vivid.mean(axis=0) > 0.5)
        runs = np.split(tall, np.flatnonzero(np.diff(tall) > 2) + 1)
        colours = [pixels[:, run[0]][vivid[:, run[0]]].mean(axis=0) for run in runs if len(run)]
        assert len(colours) == 2, (tag, tall.tolist())
        # Rise and fall in colours of their own.
        assert np.abs(colours[0] - colours[1]).max() > 0.2
