"""Networks that scripts train, each as the lines that a script has for it."""

from tools.torture.strange_scripts.entries import Entry

_NUMBERS, _VECTORS = ("numbers",), ("numbers", "classes")
_TIED = "tied|storage|view|overlap"

NETWORKS = (
    Entry("linear", "model = nn.Linear(5, 1)", _NUMBERS, tags=("linear",)),
    Entry("perceptron", "model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, OUT))", _VECTORS),
    Entry("softmax regression", "model = nn.Linear(5, 3)", ("classes",)),
    Entry(
        "dropout",
        "model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, OUT))",
        _VECTORS,
    ),
    Entry(
        "batch normalisation",
        "model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, OUT))",
        _VECTORS,
        avoid=("one sample",),
    ),
    Entry(
        "double precision",
        """
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, OUT)).double()
        x, y, xv, yv = (t.double() if t.is_floating_point() else t for t in (x, y, xv, yv))
        """,
        _VECTORS,
        tags=("precision",),
    ),
    Entry(
        "bfloat16",
        """
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, OUT)).bfloat16()
        x, y, xv, yv = (t.bfloat16() if t.is_floating_point() else t for t in (x, y, xv, yv))
        """,
        _VECTORS,
        tags=("precision",),
        tolerance=0.03,
    ),
    Entry(
        "frozen bias",
        """
        model = nn.Linear(5, 1)
        model.bias.requires_grad_(False)
        """,
        _NUMBERS,
        tags=("linear", "single"),
    ),
    Entry(
        "frozen layer",
        """
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, OUT))
        model[0].requires_grad_(False)
        """,
        _VECTORS,
    ),
    Entry(
        "bias left out of the optimizer",
        """
        model = nn.Linear(5, 1)
        trained = [model.weight]
        """,
        _NUMBERS,
        tags=("linear", "left out"),
    ),
    Entry(
        "layer left out of the optimizer",
        """
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, OUT))
        trained = list(model[2].parameters())
        """,
        _VECTORS,
        tags=("left out",),
    ),
    Entry(
        "layer that nothing uses",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.idle = nn.Linear(5, OUT), nn.Linear(3, 3)
            def forward(self, x):
                return self.used(x)
        model = Net()
        """,
        _VECTORS,
    ),
    Entry(
        "target written through .data",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.online, self.target = nn.Linear(5, OUT), nn.Linear(5, OUT)
                self.target.requires_grad_(False)
            def forward(self, x):
                return self.online(x) + 0.5 * self.target(x)
        model = Net()
        def after():
            for kept, new in zip(model.target.parameters(), model.online.parameters()):
                kept.data.mul_(0.5).add_(new.data, alpha=0.5)
        """,
        _VECTORS,
    ),
    Entry(
        "target left out of the optimizer, written through detach()",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.online, self.target = nn.Linear(5, OUT), nn.Linear(5, OUT)
            def forward(self, x):
                return self.online(x) + 0.5 * self.target(x).detach()
        model = Net()
        trained = list(model.online.parameters())
        def after():
            for kept, new in zip(model.target.parameters(), model.online.parameters()):
                kept.detach().mul_(0.5).add_(new.detach(), alpha=0.5)
        """,
        _VECTORS,
        tags=("left out",),
    ),
    Entry(
        "buffer that follows the inputs",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.Linear(5, OUT)
                self.register_buffer("mean", torch.zeros(5))
            def forward(self, x):
                if self.training:
                    self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
                return self.layers(x - self.mean)
        model = Net()
        """,
        _VECTORS,
    ),
    Entry(
        "one Parameter twice",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 1)
                self.b.weight = self.a.weight
            def forward(self, x):
                return self.a(x) + self.b(x.flip(1))
        model = Net()
        """,
        _NUMBERS,
        tags=("linear",),
    ),
    Entry(
        "transposed view of a weight",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
                self.b.weight = nn.Parameter(self.a.weight.transpose(0, 1))
            def forward(self, x):
                return self.a(x)[:, :1] + self.b(x)[:, 1:2]
        model = Net()
        """,
        _NUMBERS,
        _TIED,
        tags=("linear", "views"),
    ),
    Entry(
        "slice of a weight",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(5, 1), nn.Linear(3, 1, bias=False)
                self.b.weight = nn.Parameter(self.a.weight[:, :3])
            def forward(self, x):
                return self.a(x) + self.b(x[:, 2:])
        model = Net()
        """,
        _NUMBERS,
        _TIED,
        tags=("linear", "views"),
    ),
    Entry(
        "complex weights",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.W = nn.Parameter(0.3 * torch.randn(5, 1, dtype=torch.cfloat))
            def forward(self, x):
                return torch.view_as_real((x + 1j * x.roll(1, 1).abs()) @ self.W)[..., 0]
        model = Net()
        """,
        _NUMBERS,
        "complex",
        tags=("linear", "complex", "single"),
    ),
    Entry(
        "pairs seen as complex weights",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.W = nn.Parameter(0.3 * torch.randn(5, 1, 2))
            def forward(self, x):
                return torch.view_as_real((x + 1j * x.roll(1, 1).abs()) @ torch.view_as_complex(self.W))[..., 0]
        model = Net()
        """,
        _NUMBERS,
        tags=("linear", "complex", "single"),
    ),
    Entry(
        "complex layer",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.out = nn.Parameter(0.3 * torch.randn(5, 4, dtype=torch.cfloat)), nn.Linear(4, OUT)
            def forward(self, x):
                return self.out(((x + 0j) @ self.W).abs())
        model = Net()
        """,
        _VECTORS,
        "complex",
        tags=("complex",),
    ),
    Entry(
        "weight normalisation",
        """
        first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 8))
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, OUT))
        """,
        _VECTORS,
    ),
    Entry(
        "scale without axes",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers, self.scale = nn.Linear(5, OUT), nn.Parameter(torch.tensor(1.5))
            def forward(self, x):
                return self.scale * self.layers(x)
        model = Net()
        """,
        _VECTORS,
    ),
    Entry(
        "low-rank correction of a frozen layer",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.base, self.down, self.up = nn.Linear(5, OUT), nn.Linear(5, 1), nn.Linear(1, OUT)
                self.base.requires_grad_(False)
            def forward(self, x):
                return self.base(x) + self.up(self.down(x))
        model = Net()
        """,
        _VECTORS,
    ),
    Entry(
        "returns a tuple",
        """
        class Net(nn.Linear):
            def forward(self, x):
                return super().forward(x), x.mean()
        model = Net(5, OUT)
        head = lambda outputs: outputs[0]
        """,
        _VECTORS,
        given="head",
    ),
    Entry(
        "returns a dict",
        """
        class Net(nn.Linear):
            def forward(self, x):
                return {"prediction": super().forward(x), "size": x.abs().mean()}
        model = Net(5, OUT)
        head = lambda outputs: outputs["prediction"]
        """,
        _VECTORS,
        given="head",
    ),
    Entry(
        "returns an object with logits",
        """
        class Net(nn.Linear):
            def forward(self, x):
                return types.SimpleNamespace(logits=super().forward(x))
        model = Net(5, OUT)
        head = lambda outputs: outputs.logits
        """,
        _VECTORS,
        given="logits",
    ),
    Entry(
        "convolutions",
        """
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(16, 3),
        )
        """,
        ("images",),
        avoid=("one sample",),
    ),
)
