import gc

from groktrace.run import pending


class Recording:
    def __init__(self):
        self.flushed = 0

    def flush(self):
        self.flushed += 1


def test_who_reads_a_run_has_what_is_recorded_there_written(tmp_path, monkeypatch):
    here, there = Recording(), Recording()
    pending.register(tmp_path / "a", here.flush)
    pending.register("s3://bucket/run/", there.flush)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for place in ("a", tmp_path / "a", "link", "s3://bucket/run", tmp_path / "b"):
        pending.flush(place)
    assert (here.flushed, there.flushed) == (3, 1)
    pending.forget(tmp_path / "a", there.flush)  # not its own
    pending.flush("a")
    pending.forget(tmp_path / "a", here.flush)
    pending.flush("a")
    assert here.flushed == 4
    pending.forget("s3://bucket/run", there.flush)


def test_a_recording_is_not_kept_alive(tmp_path):
    recording = Recording()
    pending.register(tmp_path, recording.flush)
    del recording
    gc.collect()
    pending.flush(tmp_path)
