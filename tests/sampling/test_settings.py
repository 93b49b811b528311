import pytest

from groktrace.errors import SettingsError
from groktrace.sampling.settings import PAPER, SamplingSettings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nbeta": -1.0}, r"nbeta: expected a positive number or 'wbic' or 'curvature', got -1\.0"),
        ({"nbeta": "hot"}, "nbeta: expected a positive number or 'wbic' or 'curvature', got 'hot'"),
        ({"nbeta": float("nan")}, "nbeta: expected a positive number or 'wbic' or 'curvature', got nan"),
        ({"localization": 0}, "localization: expected a positive number, got 0"),
        ({"locality": -0.1}, "locality: expected a positive number, got -0.1"),
        ({"resolution": float("inf")}, "resolution: expected a positive number, got inf"),
        ({"rtol": 0.0}, r"rtol: expected a positive number, got 0\.0"),
        ({"step_size": True}, "step_size: expected a positive number, got True"),
        ({"chains": 0}, "chains: expected a whole number of at least 1, got 0"),
        ({"draws": 1.5}, r"draws: expected a whole number of at least 2, got 1\.5"),
        ({"method": "nuts"}, "method: expected one of baoab, leimkuhler_matthews, sgld, or a kernel, got 'nuts'"),
        ({"method": "sgld"}, "'sgld' takes its settings as given; set step_size, draws and burn_in"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(SettingsError, match=message):
        SamplingSettings(**wrong)


def test_the_paper_preset_is_the_published_protocol():
    assert PAPER.to_dict() == {
        **SamplingSettings().to_dict(),
        "method": "sgld",
        "nbeta": 30.0,
        "localization": 5.0,
        "step_size": 1e-4,
        "chains": 3,
        "burn_in": 100,
        "draws": 600,
        "batch_size": 128,
    }
