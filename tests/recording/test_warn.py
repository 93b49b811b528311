import warnings

import pytest

from groktrace.recording.warn import Doubts, WarnOnce, warn_user


def test_a_kind_of_warning_comes_once():
    warn_once = WarnOnce()

    def warn():
        warn_once("slow", "the disk is slow.")
        warn_once("slow", "the disk is slower.")
        warn_once("idle", "no update is seen.")

    with pytest.warns(RuntimeWarning) as caught:
        warn()
    assert [str(warning.message) for warning in caught] == [
        "groktrace: the disk is slow.",
        "groktrace: no update is seen.",
    ]


def test_a_failure_is_a_warning_and_goes_no_further():
    warn_once, done = WarnOnce(), []
    with pytest.warns(RuntimeWarning, match=r"recording failed \(ZeroDivisionError: .*\); training goes on"):
        warn_once.on_failure(lambda: 1 / 0)
    warn_once.on_failure(lambda: [].pop())  # without a second warning, which would be an error here
    warn_once.on_failure(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(KeyboardInterrupt):  # what the user wants is no failure
        warn_once.on_failure(interrupt)


def test_a_doubt_is_warned_of_and_kept_once():
    kept = []
    doubt = Doubts(WarnOnce(), lambda step, text: kept.append((step, text)), lambda: 7)
    with pytest.warns(RuntimeWarning, match="it was loaded later"):
        doubt("loaded", "it was loaded later.")
    doubt("loaded", "it was loaded later.")  # without a second warning, which would be an error here
    assert kept == [(7, "it was loaded later.")]


def test_a_process_that_does_not_write_has_no_doubts(monkeypatch):
    Doubts(WarnOnce(), None, lambda: 7)("loaded", "it was loaded later.")
    doubt = Doubts(WarnOnce(), lambda step, text: pytest.fail(text), lambda: 7)
    monkeypatch.setattr("os.getpid", lambda: -1)  # as in a forked child
    doubt("loaded", "it was loaded later.")


def interrupt():
    raise KeyboardInterrupt


def test_warnings_that_are_errors_are_printed(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_user("the disk is slow.")
    assert capsys.readouterr().err == "groktrace: the disk is slow.\n"
