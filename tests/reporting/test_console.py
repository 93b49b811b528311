import io
import json

from groktrace.reporting.console import Progress, as_json, summary, transitions_table


def test_json_holds_the_result_and_nothing_that_is_no_json(grokked, odd):
    found = json.loads(json.dumps(as_json(*grokked), allow_nan=False))
    assert found["trajectory"][1]["llc"] == -732
    assert found["transitions"][1]["label"] == "generalisation"
    assert found["grokking"]["generalised_at"] == 600
    assert found["nbeta"] == 30800
    json.dumps(as_json(*odd), allow_nan=False)


def test_table_of_transitions(grokked, odd):
    _, transitions, grokking = grokked
    text = transitions_table(transitions, grokking)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["transition", "label", "step"]
    assert lines[1].startswith("complexification  memorisation")
    assert lines[2].startswith("simplification    generalisation")
    assert f"{transitions[1].onset} - {transitions[1].end}" in lines[2]
    assert "validation confirms" in text
    assert "generalised at step 600" in text
    assert "No transition found." in transitions_table(odd[1], odd[2])


def test_summary_names_settings_and_doubtful_snapshots(grokked, odd):
    text = summary(*grokked)
    assert text.startswith("runs/x: 12 snapshots, n = 317, method averaged, nβ = 30800, γ = 424, resolution 10")
    (first,) = [line for line in text.splitlines() if line.lstrip().startswith("0 ")]
    assert "-3125" in first
    assert first.endswith("not at a minimum")
    assert summary(*odd)


def test_long_summaries_are_thinned_and_say_so(odd):
    trajectory = odd[0]
    text = summary(*odd)
    rows = [line for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) <= 31
    assert ("snapshots not shown" in text) == (len(trajectory.points) > 25)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    now = [0.0]
    stream = Terminal()
    with Progress(4, "sampling", stream, lambda: now[0]) as progress:
        for _ in range(4):
            now[0] += 10
            progress.advance()
    frames = stream.getvalue().split("\r")
    assert all(len(frame.rstrip("\n")) <= 59 for frame in frames)
    assert "sampling 1/4 10 s, about 30 s left" in frames[2]
    assert "sampling 4/4 40 s" in frames[-1]
    assert stream.getvalue().endswith("\n")


def test_narrow_terminals_get_no_wrapped_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with Progress(4, "sampling", stream) as progress:
        progress.advance(4)
    assert all(len(frame.rstrip("\n")) <= 19 for frame in stream.getvalue().split("\r"))


def test_elsewhere_one_line_in_thirty_seconds():
    now = [0.0]
    stream = io.StringIO()
    with Progress(100, "sampling", stream, lambda: now[0]) as progress:
        for _ in range(100):
            now[0] += 1
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sampling: 30 of 100, 30 s, about 1 min 10 s left"
    assert len(lines) == 4
    assert lines[-1] == "sampling: 100 done in 1 min 40 s"


def test_interrupted_work_is_not_called_done():
    stream = io.StringIO()
    try:
        with Progress(3, "sampling", stream) as progress:
            progress.advance()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert stream.getvalue() == ""
