import json

import pytest
from click.testing import CliRunner

from groktrace.cli import main

CASES = [
    (["modular-addition", "--p", "53", "--width", "1024"], 74412, 1),
    (["modular-addition", "--p", "53", "--width", "1024", "--n-train", "1123"], 29733, 1),
    (["modular-addition", "--p", "53", "--width", "1024", "--published"], 80896, 1),
    (["quadratic", "--input-dim", "6", "--output-dim", "3", "--width", "4"], 16, 1),
    (["quadratic", "--input-dim", "10", "--output-dim", "5", "--width", "20", "--n-train", "30"], 72.5, 1),
    (["quadratic", "--input-dim", "6", "--output-dim", "3", "--width", "9", "--effective-width", "4"], 16, None),
    (["deep-linear", "--widths", "8,3,9,5,7", "--rank", "2"], 14.5, 1),
    (["reduced-rank", "--m", "5", "--h", "3", "--n", "5", "--rank", "2"], 9.5, 2),
]


def invoke(*arguments):
    return CliRunner().invoke(main, ["theory", *arguments])


@pytest.mark.parametrize(("arguments", "llc", "multiplicity"), CASES)
def test_json_is_one_object(arguments, llc, multiplicity):
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found.keys() == {"llc", "multiplicity", "formula", "conditions", "source"}
    assert (found["llc"], found["multiplicity"]) == (llc, multiplicity)


@pytest.mark.parametrize(("arguments", "llc", "multiplicity"), CASES)
def test_text_says_the_same(arguments, llc, multiplicity):
    lines = invoke(*arguments).stdout.splitlines()
    assert lines[0].split() == ["λ", str(llc)]
    assert lines[1].split() == ["multiplicity", *(["not", "known"] if multiplicity is None else [str(multiplicity)])]
    labels = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert labels == ["λ", "multiplicity", "formula", "conditions", "source"]
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["modular-addition", "--p", "5", "--width", "0"], 1, "width: expected a whole number of at least 1, got 0"),
        (["modular-addition", "--p", "5.5", "--width", "4"], 2, "'5.5' is not a valid integer"),
        (["modular-addition", "--width", "4"], 2, "Missing option '--p'"),
        (["modular-addition", "--p", "5", "--width", "4", "--n-train", "9", "--published"], 2, "knows no --n-train"),
        (["deep-linear", "--widths", "8,3,x", "--rank", "1"], 2, "expected whole numbers such as 8,3,9, got '8,3,x'"),
        (["deep-linear", "--widths", "8,3,5", "--rank", "4"], 1, "rank: expected a whole number from 0 to 3"),
        (["reduced-rank", "--m", "5", "--h", "3", "--n", "5", "--rank", "4"], 1, "(the least of m, h and n), got 4"),
    ],
)
def test_bad_options_are_named(arguments, code, message):
    result = invoke(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
