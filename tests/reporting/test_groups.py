"""Runs that differ in their seed only: which these are, their mean and spread, and where they are shown."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import groktrace
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.cli import main
from groktrace.errors import SettingsError
from groktrace.reporting.comparison import Comparison, compare
from groktrace.reporting.groups import Group, Spread, group_runs, settings_of, short_names
from groktrace.reporting.series import CURVE, Events, Series


def result(name, trajectory):
    return name, Series.of(trajectory), Events.of(trajectory)


def shifted(grokked, name, by):
    """The run that groks, all of it later by so many steps, and λ larger by a tenth of that."""
    points = tuple(
        replace(
            point,
            step=point.step + by,
            llc=point.llc + by / 10,
            llc_centred=point.llc_centred + by / 10,
            train_loss=point.train_loss * 4 ** (by / 10),
        )
        for point in grokked[0].trajectory.points
    )
    return result(name, replace(grokked[0].trajectory, points=points))


@pytest.fixture
def three(grokked):
    """Three seeds: as it is, and ten steps earlier and later."""
    return Group("seed-* (3 runs)", tuple(shifted(grokked, f"runs/seed-{i}", by) for i, by in enumerate((-10, 0, 10))))


def test_the_mean_is_that_of_the_runs_on_common_steps(three, grokked):
    mean = three.mean(CURVE)
    every = [series for _, series, _ in three.members]
    assert (mean.steps[0], mean.steps[-1], mean.runs) == (10, 2990, 3)
    expected = [[np.interp(step, series.steps, series[CURVE].values) for series in every] for step in mean.steps]
    np.testing.assert_allclose(mean.value, np.mean(expected, axis=1))
    np.testing.assert_allclose(mean.high - mean.value, np.std(expected, axis=1, ddof=1))
    np.testing.assert_allclose(mean.value - mean.low, mean.high - mean.value)
    loss = three.mean("train_loss")
    at = int(np.flatnonzero(loss.steps == 2990)[0])
    rows = [np.interp(2990, series.steps, np.log(series["train_loss"].values)) for series in every]
    assert loss.value[at] == pytest.approx(np.exp(np.mean(rows)))
    assert loss.high[at] / loss.value[at] == pytest.approx(np.exp(np.std(rows, ddof=1)))
    accuracy = three.mean("val_accuracy")
    assert accuracy.low.min() >= 0
    assert accuracy.high.max() <= 1


def test_runs_on_the_same_steps_are_averaged_snapshot_by_snapshot():
    curves = ([9.0, 5.0, 1.0], [7.0, 4.0, 1.0])
    group = Group(
        "x", tuple(result(str(i), Trajectory.from_arrays([0, 7, 9], c, [0.1] * 3)) for i, c in enumerate(curves))
    )
    mean = group.mean(CURVE)
    assert (mean.steps.tolist(), mean.value.tolist()) == ([0, 7, 9], [8.0, 4.5, 1.0])
    assert mean.high[0] == pytest.approx(8 + np.sqrt(2))
    assert group.mean("val_loss").runs == 0
    assert np.isnan(group.mean("val_loss").value).all()


def test_transitions_are_dated_over_the_runs(three, grokked):
    rise, fall = three.transitions
    own = [events.transitions for _, _, events in three.members]
    assert (rise.label, fall.label, fall.runs) == ("memorisation", "generalisation", 3)
    assert fall.step == Spread.of([each[1].step for each in own])
    assert Spread.of([1, 2, 3]) == Spread(2.0, 1.0, 1.0, 3.0)
    assert fall.delta_llc.mean == pytest.approx(np.mean([each[1].delta_llc for each in own]))
    assert three.reached("generalised_at") == Spread(600.0, 10.0, 590.0, 610.0)
    flat = Trajectory.from_arrays(range(0, 700, 100), [900.0] * 7, [5.0] * 7)
    with_flat = Group("x", (three.members[0], result("flat", flat)))
    assert [(each.runs, each.step.deviation) for each in with_flat.transitions] == [(1, None), (1, None)]
    assert with_flat.reached("memorised_at").text() == "40"
    assert Group("x", (result("flat", flat),) * 2).reached("memorised_at") is None


def test_a_second_one_of_a_kind_is_one_of_its_own(three):
    name, series, events = three.members[0]
    again = replace(events.transitions[1], step=2000)
    twice = replace(events, transitions=(*events.transitions, again))
    found = Group("x", ((name, series, twice), *three.members[1:])).transitions
    assert [(each.label, each.runs) for each in found] == [
        ("memorisation", 3),
        ("generalisation", 3),
        ("generalisation", 1),
    ]
    assert found[2].step.mean == 2000


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two seeds of one setting, and a run of another width and learning rate: recorded and analysed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, lr, width in (("a-0", 0, 0.1, 4), ("a-1", 1, 0.1, 4), ("c-0", 0, 0.2, 5)):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        x = torch.randn(20, 3)
        with groktrace.watch(model, optimizer, train=(x, x[:, :2]), loss="mse", out=folder / name, every=10, seed=seed):
            for _ in range(30):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), x[:, :2]).backward()
                optimizer.step()
        groktrace.analyze(folder / name, draws=10, burn_in=10, chains=2, nbeta=100.0, localization=1.0)
    return folder


def test_runs_that_differ_in_their_seed_only_are_found(seeds):
    compared = compare(*sorted(seeds.iterdir()))
    assert [(group.name, len(group)) for group in compared.groups] == [("a-* (2 runs)", 2), ("c-0", 1)]
    assert [group.name for group in compared.shared] == ["a-* (2 runs)"]
    by_rate = compare(*sorted(seeds.iterdir()), group_by="lr")
    assert [(group.name, len(group)) for group in by_rate.groups] == [("lr = 0.1 (2 runs)", 2), ("lr = 0.2", 1)]
    by_seed = compare(*sorted(seeds.iterdir()), group_by="seed")
    assert [group.name for group in by_seed.groups] == ["seed = 0 (2 runs)", "seed = 1"]
    assert compare(seeds / "a-0", group_by="optimizer").groups[0].name == "optimizer = SGD"
    with pytest.raises(SettingsError, match=r"a-0 has no setting 'learning_rate'; it has .*lr, .*weight_decay"):
        compare(seeds / "a-0", group_by="learning_rate")
    with pytest.raises(SettingsError, match=r"has no setting 'lr'; it has none that are known"):
        compare(groktrace.open_run(seeds / "a-0").trajectory(), group_by="lr")


def test_another_loss_is_another_setting(seeds, tmp_path):
    one = settings_of(groktrace.open_run(seeds / "a-0"))
    assert one["optimizer.groups.0.lr"] == 0.1
    same = result("x", Trajectory(()))
    assert len(group_runs([same, same], [one, one | {"seed": 5, "created": "later"}])) == 1
    assert len(group_runs([same, same], [one, one | {"program": "other"}])) == 2
    assert len(group_runs([same, same], [None, None])) == 2


def test_names_are_short_and_say_what_is_common():
    assert short_names(["runs/a/seed-1", "runs/a/seed-2", "runs/b"]) == ["a/seed-1", "a/seed-2", "b"]
    assert short_names(["s3://x/a/1", "s3://x/b/1"]) == ["a/1", "b/1"]
    assert short_names(["runs/a"]) == ["runs/a"]
    empty = Trajectory(())
    (group,) = group_runs([result(name, empty) for name in ("one", "two")], [{}, {}])
    assert group.name == "one, ... (2 runs)"


def test_the_command_shows_groups_in_a_table_a_figure_json_and_tensorboard(seeds, tmp_path):
    figure, logs = tmp_path / "figure.png", tmp_path / "logs"
    paths = sorted(map(str, seeds.iterdir()))
    shown = CliRunner().invoke(main, ["compare", *paths, "-o", str(figure), "--logdir", str(logs)])
    assert shown.exit_code == 0, shown.output
    assert "Mean ± standard deviation over the runs of a group:" in shown.stdout
    assert "a-* (2 runs)" in shown.stdout
    assert f"tensorboard --logdir {logs}" in shown.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    found = json.loads(CliRunner().invoke(main, ["compare", *paths, "--json"]).stdout)
    assert found["runs"].keys() == set(paths)
    (group,) = found["groups"]
    assert group["runs"] == paths[:2]
    own = [found["runs"][name]["trajectory"] for name in paths[:2]]
    assert group["steps"] == [0, 10, 20, 30]
    assert group["curve"]["value"][-1] == pytest.approx(np.mean([each[-1]["llc_centred"] for each in own]))
    (mean,) = logs.iterdir()
    assert mean.name == "mean of a-… (2 runs)"
    none = CliRunner().invoke(main, ["compare", *paths[1:3], "--logdir", str(logs)])
    assert none.exit_code == 1
    assert "there is no mean to write" in none.stderr


def test_tensorboard_has_the_mean_as_a_run_and_its_dates_as_lines(three, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    compared = Comparison(three.members, (three,))
    for _ in range(2):  # the second replaces the first
        (place,) = compared.to_tensorboard(tmp_path)
    names = sorted(path.name for path in place.iterdir())
    rise, fall = three.transitions
    assert names == [
        "trajectory",
        f"transition 1: memorisation @ {rise.step.text()} (3 of 3)",
        f"transition 2: generalisation @ {fall.step.text()} (3 of 3)",
    ]
    assert len(list(place.rglob("*.groktrace"))) == 3
    events = EventAccumulator(str(place / "trajectory"))
    events.Reload()
    for tag, column in (("grokking/llc", "value"), ("llc/lower", "low"), ("llc/upper", "high")):
        logged = {event.step: event.value for event in events.Scalars(tag)}
        mean = three.mean(CURVE)
        assert logged == pytest.approx(dict(zip(mean.steps.tolist(), getattr(mean, column).tolist(), strict=True)))
    assert {"learning/train_loss", "grokking/val_accuracy", "learning/train_accuracy"} <= set(events.Tags()["scalars"])
    line = EventAccumulator(str(place / names[2]))
    line.Reload()
    assert line.Scalars("grokking/llc")[0].step == round(fall.step.mean)


def test_losses_that_are_negative_are_neither_left_out_nor_logarithms(three):
    def lower(trajectory):
        return replace(trajectory, points=tuple(replace(p, train_loss=p.train_loss - 1) for p in trajectory.points))

    members = tuple(result(name, lower(series.trajectory)) for name, series, _ in three.members)
    negative = Group("negative", members)
    mean = negative.mean("train_loss")
    expected = [
        [np.interp(at, series.steps, series["train_loss"].values) for _, series, _ in members] for at in mean.steps
    ]
    np.testing.assert_allclose(mean.value, np.mean(expected, axis=1))
    assert mean.value.min() < 0
    *_, loss = Comparison(members, (negative,)).plot().axes
    assert loss.get_yscale() == "linear"
    assert min(np.nanmin(line.get_ydata()) for line in loss.lines if len(line.get_ydata())) < 0


def test_the_figure_shows_mean_spread_and_dates(three, grokked, tmp_path):
    alone = ("runs/control", *grokked)
    figure = Comparison((*three.members, alone), (three, Group("control", (alone,)))).plot(tmp_path / "figure.svg")
    llc, accuracy, loss = figure.axes
    assert [axes.get_ylabel() for axes in (accuracy, loss)] == ["accuracy", "loss"]
    assert loss.get_yscale() == "log"
    mean = three.mean(CURVE)
    drawn = [line for line in llc.lines if line.get_label() == "seed-* (3 runs), mean ± std."]
    np.testing.assert_array_equal(drawn[0].get_ydata(), mean.value)
    said = [text.get_text() for text in llc.texts]
    fall = three.transitions[1].step
    assert len(said) == 1
    assert said[0].startswith("seed-* (3 runs): ▲ memorisation at step ")
    assert said[0].endswith(f"▼ generalisation at step {fall.text()}")
    thin = [line for line in llc.lines if line.get_linewidth() == 0.6]
    assert len(thin) == 3


def test_odd_runs_make_groups_too(odd, three, tmp_path):
    group = Group("odd (2 runs)", (("x", *odd), three.members[0]))
    compared = Comparison(group.members, (group,))
    compared.plot(tmp_path / "figure.png")
    assert "odd (2 runs)" in compared.table()
    json.dumps(compared.to_dict(), allow_nan=False)
    compared.to_tensorboard(tmp_path)
