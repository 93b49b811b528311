import torch

from groktrace.recording.count import UpdateCount


def test_skipped_updates_are_taken_off_when_a_step_seems_due():
    count = UpdateCount(3)
    asked = []

    def keep(step):
        asked.append(step)
        return step == 5

    count.add(1, None)
    count.add(1, torch.tensor(1))
    assert count.counted == 5
    assert count.due(keep) is None  # it was the fourth
    assert count.steps == 4
    count.add(1, torch.tensor(0))
    assert count.due(keep) == 5
    assert asked == [5, 5]
    count.restart()
    assert (count.steps, count.first) == (3, 3)
