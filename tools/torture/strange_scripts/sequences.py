"""Networks that read tokens, each as the lines that a script has for it."""

from tools.torture.strange_scripts.entries import Entry

_TOKENS, _SEQUENCES = ("tokens",), ("sequences",)

SEQUENCE_NETWORKS = (
    Entry(
        "embedding",
        "model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 7))",
        _TOKENS,
    ),
    Entry(
        "LSTM",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.cell, self.out = nn.Embedding(7, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 7)
            def forward(self, x):
                return self.out(self.cell(self.embed(x))[0][:, -1])
        model = Net()
        """,
        _TOKENS,
    ),
    Entry(
        "time-first RNN",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.cell, self.out = nn.Embedding(7, 6), nn.RNN(6, 6), nn.Linear(6, 7)
            def forward(self, x):
                return self.out(self.cell(self.embed(x.T))[0][-1])
        model = Net()
        """,
        _TOKENS,
    ),
    Entry(
        "transformer layer",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.out = nn.Embedding(7, 6), nn.Linear(6, 7)
                self.block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
            def forward(self, x):
                return self.out(self.block(self.embed(x)).mean(1))
        model = Net()
        """,
        _TOKENS,
    ),
    Entry(
        "embedding that decodes too",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.out = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
                self.out.weight = self.embed.weight
            def forward(self, x):
                return self.out(self.embed(x).mean(1).tanh())
        model = Net()
        """,
        _TOKENS,
        tags=("single",),
    ),
    Entry(
        "running sum",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.out = nn.Embedding(7, 6), nn.Linear(6, 7)
            def forward(self, x):
                return self.out(self.embed(x).cumsum(1))
        model = Net()
        """,
        _SEQUENCES,
    ),
    Entry(
        "GRU at each token",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.cell, self.out = nn.Embedding(7, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 7)
            def forward(self, x):
                return self.out(self.cell(self.embed(x))[0])
        model = Net()
        """,
        _SEQUENCES,
    ),
    Entry(
        "causal attention",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.out = nn.Embedding(7, 6), nn.Linear(6, 7)
                self.query, self.key, self.value = (nn.Linear(6, 6, bias=False) for _ in range(3))
            def forward(self, x):
                x = self.embed(x)
                q, k, v = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
                return self.out(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        model = Net()
        """,
        _SEQUENCES,
    ),
    Entry(
        "computes its own loss",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.out = nn.Embedding(7, 6), nn.Linear(6, 7)
            def forward(self, x, y):
                logits = self.out(self.embed(x).cumsum(1))
                return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())
        model = Net()
        predict = lambda model, batch: (model(*unpack(batch))[0], unpack(batch)[1])
        live = lambda model, batch: model(*unpack(batch))[1]
        """,
        _SEQUENCES,
        tags=("own loss",),
    ),
)
