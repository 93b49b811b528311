"""What an analysis is set up with: the weights that patterns and parts choose, and λ over them."""

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis.running.setup import weight_layout
from groktrace.errors import SettingsError

SHAPES = {"a.W": (4, 6), "a.W0": (2,), "a.b": (4,), "c.W": (4, 6)}
SPECS = {name: (shape, torch.float32, True) for name, shape in SHAPES.items()}


def chosen(*patterns, specs=SPECS):
    layout = weight_layout(specs, patterns)
    assert layout.shapes == tuple(
        part.of(torch.empty(specs[part.tensor][0])).shape if part is not None else specs[name][0]
        for name, part in ((name, dict(layout.parts).get(name)) for name in layout.names)
    )
    return layout.names


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("a.*",), ("a.W", "a.W0", "a.b")),
        (("a.W[0:2]",), ("a.W[0:2]",)),  # no pattern of a.W0, where there is an a.W
        (("a.W[:, 3]",), ("a.W[:, 3:4]",)),
        (("a.W[ 0:2 ,1: ]",), ("a.W[0:2, 1:6]",)),
        (("a.W[0:4, :]",), ("a.W",)),
        (("a.W[2:4]", "a.b", "a.W[0:2]"), ("a.W[0:2]", "a.W[2:4]", "a.b")),
        (("a.W[0:2]", "a.W[:2]"), ("a.W[0:2]",)),
        (("a.W[0:2]", "a.?"), ("a.W", "a.b")),
        (("*.W[1]",), ("a.W[1:2]", "c.W[1:2]")),
        (("[ac].W[1]",), ("a.W[1:2]", "c.W[1:2]")),
        (("*W[01]",), ("a.W0",)),  # as it always was: a pattern of names
        (("a.[bW]",), ("a.W", "a.b")),
    ],
)
def test_patterns_and_parts(patterns, names):
    assert chosen(*patterns) == names


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (("a.W[0:9]",), "'a.W' has no 0:9 on axis 0"),
        (("a.W[-1]",), r"'a.W\[-1\]' is no part of a tensor; expected whole numbers and slices"),
        (("a.W[0:4:2]",), "is no part of a tensor"),
        (("d.W[0:2]",), r"'d.W\[0:2\]' fits none of the trainable weights: a.W, "),
        (("a.b]",), "'a.b]' fits none of the trainable weights"),
        (("a.W[0:3]", "a.W[2:4, 1]"), r"'a.W\[0:3\]' and 'a.W\[2:4, 1:2\]' overlap; give each weight once"),
    ],
)
def test_what_fits_nothing_is_refused(patterns, said):
    with pytest.raises(SettingsError, match=said):
        weight_layout(SPECS, patterns)


def test_a_name_with_brackets_is_a_name():
    specs = {"p[0]": ((3,), torch.float32, True), "p": ((3,), torch.float32, True)}
    assert chosen("p[0]", specs=specs) == ("p[0]",)
    assert weight_layout(specs, ["p[0]"]).parts == ()


def test_layouts_without_parts_are_described_as_before():
    # What results are kept under is a digest of this.
    assert repr(weight_layout({"b": SPECS["a.b"]})) == "WeightLayout(names=('b',), shapes=((4,),), complex_names=())"


class Quadratic(nn.Module):
    """½wᵀHw, w being a matrix, or its rows 1 and 2 and the rest as parameters of their own."""

    def __init__(self, parted):
        super().__init__()
        self.parted = parted
        whole = torch.full((4, 3), 0.0)
        self.w = nn.Parameter(whole.clone(), requires_grad=not parted)
        if parted:
            self.part = nn.Parameter(whole[1:3].clone())

    def forward(self, x):
        w = torch.cat([self.w[:1], self.part, self.w[3:]]) if self.parted else self.w
        return w.flatten().expand(len(x), -1)


def test_lambda_of_a_part_is_that_of_its_block_of_the_hessian():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(12, 12, generator=generator)
    hessian = root @ root.T / 12 + 0.05 * torch.eye(12)

    def loss(outputs, targets):
        return 0.5 * torch.einsum("bi,ij,bj->b", outputs, hessian, outputs).mean() + 0 * targets.sum()

    train = torch.zeros(4, 1), torch.zeros(4, 1)
    options = {"nbeta": 100.0, "localization": 10.0, "rtol": 0.01, "seed": 3}
    found = groktrace.estimate_llc(Quadratic(False), loss, train, parameters="w[1:3]", **options)
    alone = groktrace.estimate_llc(Quadratic(True), loss, train, **options)
    curvatures = torch.linalg.eigvalsh(hessian[3:9, 3:9])
    exact = float(0.5 * (100 * curvatures / (100 * curvatures + 10)).sum())
    assert found.llc == pytest.approx(exact, abs=4 * found.stderr)
    assert found.stderr < 0.03 * exact
    assert found.llc == pytest.approx(alone.llc, rel=1e-4)  # the same noise moves the same weights
    whole = groktrace.estimate_llc(Quadratic(False), loss, train, **options)
    assert whole.llc > 1.5 * found.llc
    halves = groktrace.estimate_llc(Quadratic(False), loss, train, parameters=["w[0:2]", "w[2:4]"], **options)
    assert halves.llc == pytest.approx(whole.llc, rel=1e-4)
