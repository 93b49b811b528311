"""TensorBoard's page in a real browser: whether the markers are there for whoever looks."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing

import pytest

from groktrace.reporting.tensorboard import COLOURS, write_events

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture
def page():
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
    trajectory, transitions, grokking = grokked
    logs = tmp_path / "logs"
    write_events(trajectory, transitions, grokking, logs)
    names = sorted(path.name for path in logs.iterdir())
    page.goto(serve(logs, len(names)) + COLOURS + "#timeseries")
    page.get_by_text("llc/mean").first.wait_for(timeout=60_000)
    fall = transitions[1]
    assert names[2] == f"transition 2: generalisation @ {fall.step} [{fall.step_low}, {fall.step_high}]"
    for name in names:
        page.get_by_text(name, exact=True).first.wait_for(timeout=30_000)
    card = page.locator("card-view", has=page.get_by_text("llc/mean")).first
    accuracy = page.locator("card-view", has=page.get_by_text("accuracy/val")).first
    for chart in (card, accuracy):
        chart.scroll_into_view_if_needed()
        chart.locator("svg.series-view path, line-chart svg path").first.wait_for(state="attached", timeout=30_000)
        page.wait_for_timeout(1500)
        lines = {}
        for path in chart.locator("line-chart svg path").all():
            outline, colour = path.get_attribute("d") or "", path.evaluate("e => getComputedStyle(e).stroke")
            points = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", outline)]
            if len(points) > 2:
                width = max(x for x, _ in points) - min(x for x, _ in points)
                height = max(y for _, y in points) - min(y for _, y in points)
                lines[colour] = (width, height)
        upright = {colour: size for colour, size in lines.items() if size[0] < 12}
        # One upright line a transition, each in its own colour, about as tall as the curve in spite of smoothing.
        assert len(upright) == 2, lines
        tallest = max(height for _, height in lines.values())
        assert all(height > 0.6 * tallest for _, height in upright.values()), lines
