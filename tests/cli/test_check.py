from click.testing import CliRunner

from groktrace.cli import main
from groktrace.run import layout


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_check_counts_what_is_whole(small_run):
    assert "6 of 6 snapshots whole" in invoke("check", small_run).stdout
    path = layout.snapshot_path(small_run, 30)
    path.write_bytes(path.read_bytes()[:-1])
    result = invoke("check", small_run)
    assert result.exit_code == 3
    assert "5 of 6 snapshots whole" in result.stdout
    assert "000000000030.safetensors" in result.stderr
