"""See grokking as a phase transition: local learning coefficients along any PyTorch training run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groktrace import theory as theory
    from groktrace.analysis.detection import Detector as Detector
    from groktrace.analysis.detection import EarlyWarning as EarlyWarning
    from groktrace.analysis.detection import LargestDropDetector as LargestDropDetector
    from groktrace.analysis.detection import PiecewiseDetector as PiecewiseDetector
    from groktrace.analysis.detection import Transition as Transition
    from groktrace.analysis.detection import find_transitions as find_transitions
    from groktrace.analysis.follow import Announcement as Announcement
    from groktrace.analysis.follow import RecordingEnded as RecordingEnded
    from groktrace.analysis.follow import ScaleChanged as ScaleChanged
    from groktrace.analysis.follow import follow as follow
    from groktrace.analysis.forecast import Forecast as Forecast
    from groktrace.analysis.forecast import forecast as forecast
    from groktrace.analysis.measurement.limit import LearningCoefficient as LearningCoefficient
    from groktrace.analysis.measurement.llc import LLCEstimate as LLCEstimate
    from groktrace.analysis.point import estimate_llc as estimate_llc
    from groktrace.analysis.replay import analyze as analyze
    from groktrace.analysis.results.draws import Draws as Draws
    from groktrace.analysis.results.grokking import Grokking as Grokking
    from groktrace.analysis.results.grokking import measure_grokking as measure_grokking
    from groktrace.analysis.results.trajectory import Point as Point
    from groktrace.analysis.results.trajectory import Trajectory as Trajectory
    from groktrace.analysis.temperature import TemperatureCurve as TemperatureCurve
    from groktrace.analysis.temperature import temperature_curve as temperature_curve
    from groktrace.analysis.temperature import temperature_curve_at as temperature_curve_at
    from groktrace.errors import GroktraceError as GroktraceError
    from groktrace.importing.plan import import_checkpoints as import_checkpoints
    from groktrace.recording.recorder import Recorder as Recorder
    from groktrace.recording.watch import watch as watch
    from groktrace.reporting.base import Reporter as Reporter
    from groktrace.reporting.comparison import Comparison as Comparison
    from groktrace.reporting.comparison import compare as compare
    from groktrace.reporting.console import ConsoleReporter as ConsoleReporter
    from groktrace.reporting.csv import CsvReporter as CsvReporter
    from groktrace.reporting.figure import FigureReporter as FigureReporter
    from groktrace.reporting.series import Events as Events
    from groktrace.reporting.series import Quantity as Quantity
    from groktrace.reporting.series import Series as Series
    from groktrace.reporting.tensorboard import TensorBoardReporter as TensorBoardReporter
    from groktrace.reporting.wandb import WandbReporter as WandbReporter
    from groktrace.run.data import save_data as save_data
    from groktrace.run.store import Run as Run
    from groktrace.run.store import Snapshot as Snapshot
    from groktrace.run.store import open_run as open_run
    from groktrace.run.task import Task as Task
    from groktrace.sampling.kernels.baoab import BAOAB as BAOAB
    from groktrace.sampling.kernels.base import Kernel as Kernel
    from groktrace.sampling.kernels.leimkuhler_matthews import LeimkuhlerMatthews as LeimkuhlerMatthews
    from groktrace.sampling.kernels.sgld import SGLD as SGLD
    from groktrace.sampling.settings import SamplingSettings as SamplingSettings

# The same for when it runs: a module is imported when something of it is asked for, so that `groktrace --help`, which
# needs none of them, does not wait for PyTorch.
_NAMES = {
    "analysis.detection": (
        "Detector",
        "EarlyWarning",
        "LargestDropDetector",
        "PiecewiseDetector",
        "Transition",
        "find_transitions",
    ),
    "analysis.results.draws": ("Draws",),
    "analysis.follow": ("Announcement", "RecordingEnded", "ScaleChanged", "follow"),
    "analysis.forecast": ("Forecast", "forecast"),
    "analysis.results.grokking": ("Grokking", "measure_grokking"),
    "analysis.measurement.limit": ("LearningCoefficient",),
    "analysis.measurement.llc": ("LLCEstimate",),
    "analysis.point": ("estimate_llc",),
    "analysis.replay": ("analyze",),
    "analysis.temperature": ("TemperatureCurve", "temperature_curve", "temperature_curve_at"),
    "analysis.results.trajectory": ("Point", "Trajectory"),
    "errors": ("GroktraceError",),
    "importing.plan": ("import_checkpoints",),
    "recording.recorder": ("Recorder",),
    "recording.watch": ("watch",),
    "reporting.base": ("Reporter",),
    "reporting.comparison": ("Comparison", "compare"),
    "reporting.console": ("ConsoleReporter",),
    "reporting.csv": ("CsvReporter",),
    "reporting.figure": ("FigureReporter",),
    "reporting.series": ("Events", "Quantity", "Series"),
    "reporting.tensorboard": ("TensorBoardReporter",),
    "reporting.wandb": ("WandbReporter",),
    "run.data": ("save_data",),
    "run.store": ("Run", "Snapshot", "open_run"),
    "run.task": ("Task",),
    "sampling.kernels.baoab": ("BAOAB",),
    "sampling.kernels.base": ("Kernel",),
    "sampling.kernels.leimkuhler_matthews": ("LeimkuhlerMatthews",),
    "sampling.kernels.sgld": ("SGLD",),
    "sampling.settings": ("SamplingSettings",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["theory", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "theory":
        return import_module("groktrace.theory")
    if name in ("analysis", "errors", "importing", "recording", "reporting", "run", "sampling"):
        for module in _NAMES:  # whoever reaches into a package finds what `import groktrace` promises to be there
            import_module(f"groktrace.{module}")
        return import_module(f"groktrace.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'groktrace' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"groktrace.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
