import json
import os

from click.testing import CliRunner

from groktrace.cli import main

FAST = ["--draws", "20", "--burn-in", "20"]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_following_prints_one_object_a_line_and_the_result_last(small_run, monkeypatch):
    priorities = []
    monkeypatch.setattr(os, "nice", priorities.append)
    result = invoke("follow", small_run, "--json", *FAST)
    assert result.exit_code in (0, 3)
    *events, end, found = [json.loads(line) for line in result.stdout.splitlines()]
    assert priorities == [19]
    assert events[0].keys() == {"event", "nbeta", "localization", "curvature"}
    assert [event["step"] for event in events[1:]] == [0, 10, 20, 30, 40, 50]
    assert end == {"event": "end", "reason": "closed"}
    assert found == json.loads(invoke("show", small_run, "--json").stdout)
    assert list((small_run / "tensorboard").rglob("*.groktrace"))
