"""Networks that are too large to stack, from the model or the recording to the estimate."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import groktrace
from groktrace.sampling import network

SETTINGS = {"chains": 2, "burn_in": 30, "draws": 200}


@pytest.fixture
def everything_is_large(monkeypatch):
    memory = replace(network.MEMORY, large_weights=1, micro_batch_bytes=2000, micro_batch_share=0)
    monkeypatch.setattr(network, "MEMORY", memory)


def test_a_large_run_is_measured_like_a_small_one(small_run, monkeypatch):
    expected = groktrace.analyze(small_run, hessian=True, **SETTINGS)
    memory = replace(network.MEMORY, large_weights=1, micro_batch_bytes=2000, micro_batch_share=0)
    monkeypatch.setattr(network, "MEMORY", memory)
    alone = []
    plain = network.LargeNetwork.add_gradient
    monkeypatch.setattr(
        network.LargeNetwork,
        "add_gradient",
        lambda self, *a, **k: alone.append(self.loss.micro_batch) or plain(self, *a, **k),
    )
    found = groktrace.analyze(small_run, hessian=True, seed=1, **SETTINGS)  # another seed, another folder
    assert 1 <= max(alone) < 60
    assert found.nbeta == pytest.approx(expected.nbeta, rel=0.1)
    for a, b in zip(found.points, expected.points, strict=True):
        for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5)
        assert a.diagnostics["top_curvature"] == pytest.approx(b.diagnostics["top_curvature"], rel=0.15)
        assert a.hessian_trace == pytest.approx(
            b.hessian_trace, abs=4 * (a.hessian_trace_stderr + b.hessian_trace_stderr)
        )
        error = 4 * (a.stderr_centred + b.stderr_centred)
        assert a.llc_centred == pytest.approx(b.llc_centred, abs=error + 0.1 * abs(b.llc_centred))


def test_half_precision_weights_with_a_state_of_single_precision(everything_is_large):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = torch.randn(80, 4), torch.randint(0, 3, (80,))
    half = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).bfloat16()
    half.load_state_dict(model.state_dict())
    model.load_state_dict(half.state_dict())  # the same rounded weights in float32
    kept = {name: tensor.clone() for name, tensor in half.state_dict().items()}

    def of_floats(network, batch):
        return nn.functional.cross_entropy(network(batch[0].to(network[0].weight.dtype)), batch[1])

    settings = {"nbeta": 50.0, "localization": 10.0, **SETTINGS}
    expected = groktrace.estimate_llc(model, None, (x, y), batch_loss=of_floats, **settings)
    found = groktrace.estimate_llc(half, None, (x, y), batch_loss=of_floats, **settings)
    assert found.llc == pytest.approx(expected.llc, rel=1e-3)
    assert found.step_size == pytest.approx(expected.step_size, rel=1e-3)
    assert all(torch.equal(half.state_dict()[name], tensor) for name, tensor in kept.items())


def test_only_some_of_the_weights_of_a_large_network_move(everything_is_large):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = torch.randn(80, 4), torch.randint(0, 3, (80,))
    settings = {"nbeta": 50.0, "localization": 10.0, "parameters": "2.*", **SETTINGS}
    estimate = groktrace.estimate_llc(model, "cross_entropy", (x, y), **settings)
    assert 0 < estimate.llc_centred < 0.5 * 39
    assert estimate.diagnostics["virial"] == pytest.approx(1, abs=0.1)  # relative to the 39 that move
