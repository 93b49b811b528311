import math

import pytest

from groktrace.analysis.results.trajectory import Point, with_logged


@pytest.mark.parametrize(
    ("metrics", "loss", "accuracy"),
    [
        ({"val_loss": 0.5, "val_acc": 0.75}, 0.5, 0.75),
        ({"eval_loss": 0.5, "eval_accuracy": 0.75, "loss": 9.0, "accuracy": 0.1}, 0.5, 0.75),
        ({"val/loss": 0.5, "Valid_Acc": 1.0}, 0.5, 1.0),
        ({"val_accuracy": 75.0, "val_loss": math.nan}, None, None),
        ({"train_loss": 0.5, "evaluated_loss": 0.5, "val_f1": 0.5}, None, None),
    ],
)
def test_what_was_logged_of_the_validation_counts_where_nothing_was_measured(metrics, loss, accuracy):
    point = with_logged(Point(3, 1.0, 0.1), metrics)
    assert (point.val_loss, point.val_accuracy) == (loss, accuracy)
    assert point.metrics == metrics
    measured = with_logged(Point(3, 1.0, 0.1, val_loss=2.0), metrics)
    assert (measured.val_loss, measured.val_accuracy) == (2.0, None)
