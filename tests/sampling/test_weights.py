import torch

from groktrace.sampling.weights import WeightLayout


def test_flat_vectors_are_float32_unless_double():
    layout = WeightLayout(("a", "b"), ((2, 3), ()))
    weights = {"a": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.tensor(7.0)}
    flat = layout.flatten(weights)
    assert flat.dtype == torch.float32
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert layout.unflatten(flat)["a"].shape == (2, 3)
    assert layout.unflatten(flat)["b"].shape == ()
    assert layout.size == 7
    assert layout.flatten({"a": weights["a"], "b": weights["b"].double()}).dtype == torch.float64


def test_complex_weights_are_pairs_of_real_ones():
    layout = WeightLayout(("a", "w", "b"), ((3,), (2, 4), (1,)), ("w",))
    assert (layout.sizes, layout.size) == ([3, 16, 1], 20)
    weights = {"a": torch.randn(3), "w": torch.randn(2, 4, dtype=torch.complex64), "b": torch.randn(1)}
    flat = layout.flatten(weights)
    assert flat.dtype == torch.float32
    assert torch.equal(flat[3:19], torch.view_as_real(weights["w"]).flatten())
    assert all(torch.equal(found, weights[name]) for name, found in layout.unflatten(flat).items())
    rows = torch.func.vmap(layout.unflatten)(torch.stack([flat, 2 * flat]))  # at odd places too
    assert torch.equal(rows["w"][1], 2 * weights["w"])
    places = layout.places(flat)
    places["w"].zero_()
    assert not flat[3:19].any()
    assert layout.flatten({**weights, "w": weights["w"].to(torch.complex128)}).dtype == torch.float64
    assert torch.equal(layout.flatten({**weights, "w": weights["w"].conj()})[3:19:2], weights["w"].real.flatten())
