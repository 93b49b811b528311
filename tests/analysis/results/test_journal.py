import errno
import fcntl
import io
import multiprocessing

import pytest

from groktrace.analysis.results.journal import append_lines, exclusive, read_lines
from groktrace.errors import RunError
from groktrace.run.files import TEMPORARY_PREFIX


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "j.jsonl"
    assert read_lines(path) == []
    append_lines(path, [{"a": 1}, {"a": 2}])
    append_lines(path, [{"a": 3}])
    assert read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_an_interrupted_line_is_dropped_wherever_it_was_cut(tmp_path):
    path = tmp_path / "j.jsonl"
    append_lines(path, [{"a": 1}, {"b": "two"}])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = read_lines(path)
        assert kept == [{"a": 1}, {"b": "two"}][: whole[:length].count(b"\n")]
        append_lines(path, [{"c": 3}])
        assert read_lines(path) == [*kept, {"c": 3}]


@pytest.mark.parametrize("cut", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 200_000])
def test_only_the_end_of_a_long_journal_is_read(tmp_path, monkeypatch, cut):
    path = tmp_path / "j.jsonl"
    append_lines(path, [{"a": i} for i in range(5000)])
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * cut)
    append_lines(path, [{"a": "last"}])
    assert path.read_bytes().startswith(whole)
    assert read_lines(path)[-2:] == [{"a": 4999}, {"a": "last"}]
    size = path.stat().st_size
    reads = []

    class Counting(io.FileIO):
        def read(self, count=-1):
            reads.append(count)
            return super().read(count)

    monkeypatch.setattr("builtins.open", lambda place, mode: Counting(place, mode.replace("b", "")))
    append_lines(path, [{"a": "more"}])
    assert 0 < sum(reads) <= 2**16 < size


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"a": 1}\n{"a"; 2}\n{"a": 3}\n')
    with pytest.raises(RunError, match=r"j\.jsonl: line 2 is damaged .*; remove the file to redo it"):
        read_lines(path)


def _hold(folder, ready, release):
    with exclusive(folder):
        ready.set()
        release.wait(30)


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, release))
    process.start()
    try:
        assert ready.wait(30)
        with (
            pytest.raises(RunError, match=rf"another analysis \(process {process.pid} on .*\) is writing here"),
            exclusive(tmp_path),
        ):
            pass
    finally:
        release.set()
        process.join()
    with exclusive(tmp_path):
        pass


def test_a_changed_digit_is_noticed(tmp_path):
    path = tmp_path / "j.jsonl"
    append_lines(path, [{"a": 1}, {"a": 2}])
    path.write_text(path.read_text().replace('"a": 2', '"a": 3'))
    with pytest.raises(RunError, match=r"line 2 is damaged \(it does not match its digest\)"):
        read_lines(path)


def test_a_file_system_without_locks_is_not_held(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path):
        pass


def test_what_a_killed_analysis_left_is_removed(tmp_path):
    (tmp_path / f"{TEMPORARY_PREFIX}-settings.json-1").touch()
    with exclusive(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
