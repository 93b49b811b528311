"""What the public functions take and give, for mypy to read; nothing runs it."""

from pathlib import Path

import torch

import groktrace


class Quiet:
    """A reporter of one's own."""

    def report(self, series: groktrace.Series, events: groktrace.Events, place: Path) -> None:
        """Show nothing."""


kernels: list[groktrace.Kernel] = [groktrace.BAOAB(), groktrace.LeimkuhlerMatthews(), groktrace.SGLD()]
detectors: list[groktrace.Detector] = [groktrace.PiecewiseDetector(), groktrace.LargestDropDetector()]
reporters: list[groktrace.Reporter] = [
    groktrace.TensorBoardReporter(),
    groktrace.ConsoleReporter(),
    groktrace.CsvReporter(),
    groktrace.FigureReporter(),
    groktrace.WandbReporter("grokking"),
    Quiet(),
]
settings = groktrace.SamplingSettings(chains=4, nbeta="curvature")
run = groktrace.open_run("run")

trajectory: groktrace.Trajectory = groktrace.analyze(
    run, settings=settings, method=kernels[0], detector=detectors[0], reporters=reporters
)
imported: groktrace.Run = groktrace.import_checkpoints(
    ["a.pt", Path("b")],
    task=groktrace.Task.from_model(torch.nn.Linear(2, 2), loss="mse"),
    out="run",
    step_from=r"_(\d+)",
)
groktrace.save_data(Path("other.safetensors"), (torch.zeros(2, 2), torch.zeros(2)), n=9)
refined: groktrace.Trajectory = groktrace.analyze(run, train="other.safetensors", n=10, parameters=["0.weight[:, 3]"])
both: groktrace.Comparison = groktrace.compare(run, analyses=True)
latest: groktrace.Trajectory = groktrace.analyze(run, keep="losses")
draws: groktrace.Draws = run.draws(300)
llc: float = draws.llc
latest = run.trajectory()
run.snapshots[-1].load_into(torch.nn.Linear(2, 2))
for event in groktrace.follow("run", timeout=60, detector=detectors[1], reporters=reporters, draws=100):
    if isinstance(event, groktrace.Announcement):
        step: int = event.transition.step
seconds: float = groktrace.forecast(Path("run"), train="other.safetensors", settings=settings, rtol=0.1).seconds
limit: groktrace.LearningCoefficient | None = groktrace.temperature_curve_at("run", 300, train="other", seed=3).limit
table: str = groktrace.compare("a", Path("b"), run, trajectory, detector=detectors[0]).table()

groktrace.import_checkpoints("saved", out="run")  # type: ignore[call-arg]
groktrace.analyze(run, keep="all")  # type: ignore[arg-type]
groktrace.analyze(run, chain=4)  # type: ignore[call-arg]
groktrace.save_data(3, (torch.zeros(2),))  # type: ignore[arg-type]
groktrace.follow(run, draws="many")  # type: ignore[arg-type]
groktrace.forecast(run, setting=settings)  # type: ignore[call-arg]
groktrace.compare(run, 3)  # type: ignore[arg-type]
run.snapshots[-1].load_into({})  # type: ignore[arg-type]
