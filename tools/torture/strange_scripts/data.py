"""Forms of data that training scripts are made of, each as the lines that a script has for it.

`form(x, y)` is what watch() gets of samples, `real(x, y)` are those that the script trains on, and `pack` and `unpack`
lead from inputs and targets to a batch of the form and back.
"""

from tools.torture.strange_scripts.entries import Entry

_FLOATS, _SEQUENCES = ("numbers",), ("sequences",)
_LIST = "list|batches"
_SAMPLER = "sampler"
_LABELLED = ("classes", "images", "tokens")
_ORDER = r"first (axis|dimension)|time|samples"

DATA = (
    Entry("pair of tensors", "form = lambda x, y: (x, y)"),
    Entry("list of two tensors", "form = lambda x, y: [x, y]"),
    Entry(
        "dict of tensors",
        """
        form = pack = lambda x, y: {"x": x, "y": y}
        unpack = lambda batch: (batch["x"], batch["y"])
        """,
        given="batch",
    ),
    Entry(
        "nested tuples and a third field",
        """
        form = pack = lambda x, y: ((x, torch.zeros(len(x))), y)
        unpack = lambda batch: (batch[0][0], batch[1])
        """,
        given="batch",
    ),
    Entry(
        "transposed view",
        """
        form = lambda x, y: (x.T.contiguous().T, y)
        real = lambda x, y: form(x, y)
        """,
        ("numbers", "classes", "tokens"),
    ),
    Entry(
        "transposed and sliced out of one tensor",
        """
        def form(x, y):
            whole = torch.cat([x, y], 1).T.contiguous()
            return whole[:-1].T, whole[-1:].T
        """,
        _FLOATS,
    ),
    Entry(
        "expanded view",
        """
        form = real = lambda x, y: (x[:, :1].expand(-1, 5), y)
        """,
        ("numbers", "classes"),
    ),
    Entry(
        "every second row",
        """
        form = real = lambda x, y: (x[::2], y[::2])
        """,
    ),
    Entry(
        "time first",
        """
        form = pack = lambda x, y: (x.T, y.T)
        unpack = lambda batch: (batch[0].T, batch[1].T)
        """,
        _SEQUENCES,
        _ORDER,
        given="batch",
    ),
    Entry("list of batches", "form = lambda x, y: list(zip(x.split(10), y.split(10)))"),
    Entry("list of batches as lists", "form = lambda x, y: [[a, b] for a, b in zip(x.split(10), y.split(10))]"),
    Entry(
        "list of batches as dicts",
        """
        pack = lambda x, y: {"x": x, "y": y}
        unpack = lambda batch: (batch["x"], batch["y"])
        form = lambda x, y: [pack(a, b) for a, b in zip(x.split(10), y.split(10))]
        """,
        given="batch",
    ),
    Entry("list of samples", "form = lambda x, y: list(zip(x, y))", _SEQUENCES, _LIST),
    Entry("list of samples with a target each", "form = lambda x, y: list(zip(x, y))", ("numbers",), _LIST),
    Entry("list of samples with a class each", "form = lambda x, y: list(zip(x, y))", _LABELLED, _LIST + "|axis|axes"),
    Entry("TensorDataset", "form = data.TensorDataset"),
    Entry(
        "Dataset of its own",
        """
        class Samples(data.Dataset):
            def __init__(self, x, y):
                self.x, self.y = x, y
            def __len__(self):
                return len(self.x)
            def __getitem__(self, index):
                return self.x[index], self.y[index]
        form = Samples
        """,
    ),
    Entry(
        "Dataset of dicts",
        """
        class Samples(data.TensorDataset):
            def __getitem__(self, index):
                return {"x": self.tensors[0][index], "y": self.tensors[1][index]}
        form = Samples
        pack = lambda x, y: {"x": x, "y": y}
        unpack = lambda batch: (batch["x"], batch["y"])
        """,
        given="batch",
    ),
    Entry(
        "Dataset that augments",
        """
        DRAWS = 40
        class Samples(data.TensorDataset):
            def __getitem__(self, index):
                x, y = super().__getitem__(index)
                return x + 0.2 * torch.randn_like(x), y
        form = Samples
        real = lambda x, y: (x + 0.2 * torch.randn_like(x), y)
        """,
        ("numbers", "classes", "images"),
        "random|augment",
        tags=("random",),
    ),
    Entry(
        "Subset",
        """
        form = lambda x, y: data.Subset(data.TensorDataset(x, y), range(0, len(x), 3))
        real = lambda x, y: (x[::3], y[::3])
        """,
    ),
    Entry(
        "parts of a random split, in loaders",
        """
        both = data.TensorDataset(torch.cat([x, xv]), torch.cat([y, yv]))
        first, second = data.random_split(both, [40, 28])
        form = lambda x, y: data.DataLoader(first if len(x) == 48 else second, batch_size=10, shuffle=True)
        real = lambda x, y: both[torch.tensor((first if len(x) == 48 else second).indices)]
        """,
    ),
    Entry(
        "DataLoader",
        "form = lambda x, y: data.DataLoader(data.TensorDataset(x, y), batch_size=12, shuffle=True)",
    ),
    Entry(
        "DataLoader with a generator of its own",
        """
        def form(x, y):
            own = torch.Generator().manual_seed(1)
            return data.DataLoader(data.TensorDataset(x, y), batch_size=12, shuffle=True, generator=own)
        """,
    ),
    Entry(
        "SubsetRandomSampler",
        """
        def form(x, y):
            own = torch.Generator().manual_seed(1)
            chosen = data.SubsetRandomSampler(range(len(x) // 3), generator=own)
            return data.DataLoader(data.TensorDataset(x, y), batch_size=8, sampler=chosen)
        real = lambda x, y: (x[: len(x) // 3], y[: len(x) // 3])
        """,
        matter=_SAMPLER,
    ),
    Entry(
        "WeightedRandomSampler",
        """
        def form(x, y):
            weights = 1.0 + 2.0 * (torch.arange(len(x)) % 2)
            return data.DataLoader(
                data.TensorDataset(x, y), batch_size=8, sampler=data.WeightedRandomSampler(weights, len(x))
            )
        real = lambda x, y: tuple(t.repeat_interleave(1 + 2 * (torch.arange(len(t)) % 2), 0) for t in (x, y))
        """,
        matter=_SAMPLER,
        tags=("weighted",),
    ),
    Entry(
        "WeightedRandomSampler that leaves samples out",
        """
        def form(x, y):
            weights = (torch.arange(len(x)) < len(x) // 2).double()
            return data.DataLoader(
                data.TensorDataset(x, y), batch_size=8, sampler=data.WeightedRandomSampler(weights, len(x))
            )
        real = lambda x, y: (x[: len(x) // 2], y[: len(y) // 2])
        """,
        matter=_SAMPLER,
    ),
    Entry(
        "sampler of its own",
        """
        class Even(data.Sampler):
            def __init__(self, size):
                self.size, self.draws = size, random.Random(0)
            def __len__(self):
                return self.size // 2
            def __iter__(self):
                return iter(self.draws.sample(range(0, self.size, 2), self.size // 2))
        def form(x, y):
            return data.DataLoader(data.TensorDataset(x, y), batch_size=8, sampler=Even(len(x)))
        real = lambda x, y: (x[::2], y[::2])
        """,
        matter=_SAMPLER,
    ),
    Entry(
        "batch sampler",
        """
        def form(x, y):
            chosen = data.BatchSampler(data.SequentialSampler(range(len(x) // 2)), 7, drop_last=False)
            return data.DataLoader(data.TensorDataset(x, y), batch_sampler=chosen)
        real = lambda x, y: (x[: len(x) // 2], y[: len(x) // 2])
        """,
        matter=_SAMPLER,
    ),
    Entry(
        "DataLoader that drops the rest, unshuffled",
        """
        form = lambda x, y: data.DataLoader(data.TensorDataset(x, y), batch_size=9, drop_last=True)
        real = lambda x, y: (x[: len(x) // 9 * 9], y[: len(x) // 9 * 9])
        """,
        matter="drop_last",
    ),
    Entry(
        "DataLoader that drops the rest, shuffled",
        "form = lambda x, y: data.DataLoader(data.TensorDataset(x, y), batch_size=9, shuffle=True, drop_last=True)",
    ),
    Entry(
        "collate_fn that pads",
        """
        sizes = lambda y: 2 + torch.arange(len(y)) % 4
        def padded(samples):
            inputs, targets = zip(*samples)
            rows = nn.utils.rnn.pad_sequence
            return rows(inputs, batch_first=True), rows(targets, batch_first=True, padding_value=-100)
        def form(x, y):
            samples = [(a[:size], b[:size]) for a, b, size in zip(x, y, sizes(y))]
            return data.DataLoader(samples, batch_size=12, shuffle=True, collate_fn=padded)
        real = lambda x, y: padded([(a[:size], b[:size]) for a, b, size in zip(x, y, sizes(y))])
        """,
        problems=_SEQUENCES,
        tags=("padded",),
    ),
    Entry(
        "collate_fn that puts time first",
        """
        def turned(samples):
            inputs, targets = zip(*samples)
            return torch.stack(inputs, 1), torch.stack(targets, 1)
        form = lambda x, y: data.DataLoader(data.TensorDataset(x, y), batch_size=12, shuffle=True, collate_fn=turned)
        pack = lambda x, y: (x.T, y.T)
        unpack = lambda batch: (batch[0].T, batch[1].T)
        """,
        problems=_SEQUENCES,
        matter=_ORDER + "|collate",
        given="batch",
    ),
    Entry(
        "collate_fn into a dict",
        """
        pack = lambda x, y: {"x": x, "y": y}
        unpack = lambda batch: (batch["x"], batch["y"])
        collate = lambda samples: pack(*map(torch.stack, zip(*samples)))
        form = lambda x, y: data.DataLoader(data.TensorDataset(x, y), batch_size=12, shuffle=True, collate_fn=collate)
        """,
        given="batch",
    ),
    Entry(
        "stream of samples",
        """
        class Stream(data.IterableDataset):
            def __init__(self, x, y):
                self.x, self.y = x, y
            def __iter__(self):
                return zip(self.x, self.y)
        form = lambda x, y: data.DataLoader(Stream(x, y), batch_size=12)
        """,
        matter="Iterable|length|stream",
    ),
    Entry(
        "DataLoader over batches",
        """
        form = lambda x, y: data.DataLoader(list(zip(x.split(12), y.split(12))), batch_size=None)
        """,
        matter="batch_size=None",
    ),
    Entry("9000 samples", "form = lambda x, y: (x, y)", ("numbers", "classes"), tags=("many",), tolerance=0.03),
    Entry(
        "loader of 9000 samples",
        "form = lambda x, y: data.DataLoader(data.TensorDataset(x, y), batch_size=50, shuffle=True)",
        ("numbers",),
        tags=("many",),
        tolerance=0.03,
    ),
    Entry("one sample", "form = lambda x, y: (x, y)", tags=("one sample",)),
    Entry(
        "loader to train on, a pair to validate on",
        """
        def form(x, y):
            both = data.TensorDataset(x, y)
            return data.DataLoader(both, batch_size=12, shuffle=True) if len(x) == 48 else (x, y)
        """,
    ),
)
