import numpy as np
import pytest

from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.reporting.series import Events, Series

STEPS = [0, 50, 100, 150, 200, 300, 400, 600, 800, 1200, 2000, 3000]
LLC = [-3125, -732, 1062, 1279, 1301, 1251, 1199, 1081, 998, 891, 838, 836]
CENTRED = [139, 890, 1279, 1340, 1330, 1277, 1234, 1116, 1033, 924, 859, 844]
VAL = [0.06, 0.0, 0.08, 0.21, 0.35, 0.62, 0.86, 1, 1, 1, 1, 1]


def result(trajectory):
    return Series.of(trajectory), Events.of(trajectory)


@pytest.fixture
def grokked():
    """Series and events of a run that groks."""
    points = tuple(
        Point(
            step,
            float(llc),
            6.0,
            float(centred),
            5.0,
            step >= 150,
            () if step >= 150 else ("not at a minimum: the loss falls on moving away from the snapshot",),
            0.5 * 0.97**step + 1e-5,
            min(1.0, 0.06 + step / 50),
            0.8 * 0.997**step,
            float(val),
            {"lr": 0.003},
            {"virial": 1.0, "distance": None},
        )
        for step, llc, centred, val in zip(STEPS, LLC, CENTRED, VAL, strict=True)
    )
    return result(Trajectory(points, 317, 30800.0, 424.0, 10.0, 0.3, "leimkuhler_matthews", "runs/x"))


@pytest.fixture(params=["empty", "one", "unknown", "flat", "many", "log-spaced"])
def odd(request):
    """Results that a chart must survive."""
    if request.param == "empty":
        return result(Trajectory(()))
    if request.param == "one":
        return result(Trajectory((Point(0, 1.0, 0.1),)))
    if request.param == "unknown":
        return result(Trajectory(tuple(Point(step, None, None, reliable=False) for step in range(7))))
    if request.param == "log-spaced":
        steps = np.unique(np.geomspace(1, 1e6, 60).astype(int))
        return result(Trajectory.from_arrays(steps, 900.0 + 0 * steps, 1.0 + 0 * steps))
    count = 2000 if request.param == "many" else 7
    return result(Trajectory.from_arrays(range(count), np.full(count, 5.0), np.full(count, 0.1)))
