from groktrace.reporting.sketch import small_curve


def test_the_curve_rises_and_falls_where_lambda_does(grokked):
    transitions = grokked[1].transitions
    lines = small_curve(*grokked).splitlines()
    assert lines[0].startswith("1340 |")
    assert lines[7].startswith(" 139 |")
    top = [i for i, character in enumerate(lines[0].split("|", 1)[1]) if character in "'."]
    assert round(150 / 3000 * 63) in top  # the peak's column
    assert max(top) < round(600 / 3000 * 63)
    assert lines[8].split() == ["0", "3000"]
    assert lines[9].split() == ["1", "2"]
    assert lines[9].index("2") - 6 == round(transitions[1].step / 3000 * 63)


def test_a_curve_of_odd_trajectories(odd):
    known = sum(point.llc is not None for point in odd[0].trajectory.points)
    assert (small_curve(*odd) == "") == (known < 3)
