"""From a trajectory to its phase transitions: the detector protocol, the method used by default, and a plain one."""

from groktrace.analysis.detection.base import Detector as Detector
from groktrace.analysis.detection.base import Transition as Transition
from groktrace.analysis.detection.early_warning import EarlyWarning as EarlyWarning
from groktrace.analysis.detection.early_warning import last_fall as last_fall
from groktrace.analysis.detection.largest_drop import LargestDropDetector as LargestDropDetector
from groktrace.analysis.detection.piecewise import PiecewiseDetector as PiecewiseDetector
from groktrace.analysis.detection.piecewise import find_transitions as find_transitions
