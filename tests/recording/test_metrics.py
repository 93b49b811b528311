import pytest
import torch

from groktrace.recording.metrics import numbers_in
from groktrace.recording.warning import WarnOnce


def test_what_is_no_number_is_left_out_and_told_once():
    warn_once = WarnOnce()
    with pytest.warns(RuntimeWarning, match="log: 'b' is left out, as it is no number") as caught:
        for _ in range(2):
            found = numbers_in({"a": torch.tensor([2.0]), "b": "x", "c": 1}, warn_once)
            assert found == {"a": 2.0, "c": 1.0}
    assert len(caught) == 1
