import pytest
import torch

from groktrace.recording.metrics import numbers_in
from groktrace.recording.warn import WarnOnce


def test_what_is_no_number_is_left_out_and_told_once():
    warn_once = WarnOnce()
    given, expected = {"a": torch.tensor([2.0]), "b": "x", "c": 1}, {"a": 2.0, "c": 1.0}
    with pytest.warns(RuntimeWarning, match="log: 'b' is left out, as it is no number"):
        assert numbers_in(given, warn_once) == expected
    assert numbers_in(given, warn_once) == expected  # without a warning, which would be an error
