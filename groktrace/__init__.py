"""See grokking as a phase transition: local learning coefficients along any PyTorch training run."""

from groktrace import theory as theory
from groktrace.analysis.detection import Detector as Detector
from groktrace.analysis.detection import LargestDropDetector as LargestDropDetector
from groktrace.analysis.detection import PiecewiseDetector as PiecewiseDetector
from groktrace.analysis.detection import Transition as Transition
from groktrace.analysis.detection import find_transitions as find_transitions
from groktrace.analysis.grokking import Grokking as Grokking
from groktrace.analysis.grokking import measure_grokking as measure_grokking
from groktrace.analysis.llc import LLCEstimate as LLCEstimate
from groktrace.analysis.point import estimate_llc as estimate_llc
from groktrace.analysis.replay import analyze as analyze
from groktrace.analysis.temperature import TemperatureCurve as TemperatureCurve
from groktrace.analysis.temperature import temperature_curve as temperature_curve
from groktrace.analysis.trajectory import Point as Point
from groktrace.analysis.trajectory import Trajectory as Trajectory
from groktrace.errors import GroktraceError as GroktraceError
from groktrace.recording.recorder import Recorder as Recorder
from groktrace.recording.watch import watch as watch
from groktrace.run.store import Run as Run
from groktrace.run.store import Snapshot as Snapshot
from groktrace.run.store import open_run as open_run
from groktrace.run.task import Task as Task
from groktrace.sampling.settings import SamplingSettings as SamplingSettings
