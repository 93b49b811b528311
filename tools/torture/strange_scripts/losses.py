"""Losses that training scripts are made of, each as the lines that a script has for it."""

from tools.torture.strange_scripts.entries import PROBLEMS, Entry

_NUMBERS, _LABELLED = ("numbers",), ("classes", "images", "tokens")
_ALL, _SEQUENCES = tuple(PROBLEMS), ("sequences",)
_FUNCTION, _BATCH = "loss=objective", "batch_loss=live"
_LOSS = r"\bloss\b"

LOSSES = (
    Entry("mse by name", "objective = F.mse_loss", _NUMBERS, tags=("quadratic",), given='loss="mse"'),
    Entry("cross-entropy by name", "objective = F.cross_entropy", _LABELLED, given='loss="cross_entropy"'),
    Entry("cross-entropy of flat tokens", "objective = base", _SEQUENCES, given=_FUNCTION),
    Entry("the network's own", "", _SEQUENCES, tags=("own",), given=_BATCH),
    Entry("mse module", "objective = nn.MSELoss()", _NUMBERS, tags=("quadratic",), given=_FUNCTION),
    Entry(
        "half the squared error",
        "objective = lambda predictions, targets: 0.5 * F.mse_loss(predictions, targets)",
        _NUMBERS,
        tags=("quadratic",),
        given=_FUNCTION,
    ),
    Entry(
        "squared error summed over the batch",
        'objective = nn.MSELoss(reduction="sum")',
        _NUMBERS,
        r"mean|\bsum",
        tags=("quadratic", "summed"),
        given=_FUNCTION,
    ),
    Entry(
        "sum divided by the batch's size",
        "objective = lambda predictions, targets: (predictions - targets).square().sum() / len(targets)",
        _NUMBERS,
        tags=("quadratic",),
        given=_FUNCTION,
    ),
    Entry("Huber loss", "objective = F.smooth_l1_loss", _NUMBERS, given=_FUNCTION),
    Entry("cross-entropy module", "objective = nn.CrossEntropyLoss()", _LABELLED, given=_FUNCTION),
    Entry(
        "label smoothing",
        "objective = nn.CrossEntropyLoss(label_smoothing=0.1)",
        _LABELLED,
        given=_FUNCTION,
    ),
    Entry(
        "class weights",
        "objective = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, OUT))",
        _LABELLED,
        given=_FUNCTION,
        avoid=("precision",),
    ),
    Entry(
        "ignored targets",
        """
        y[::5], yv[::5] = -1, -1
        objective = nn.CrossEntropyLoss(ignore_index=-1)
        """,
        _LABELLED,
        given=_FUNCTION,
        avoid=("one sample",),
    ),
    Entry(
        "cross-entropy summed over the batch",
        'objective = nn.CrossEntropyLoss(reduction="sum")',
        _LABELLED,
        r"mean|\bsum",
        tags=("summed",),
        given=_FUNCTION,
    ),
    Entry(
        "log-softmax and negative log-likelihood",
        "objective = lambda predictions, targets: F.nll_loss(predictions.log_softmax(1), targets)",
        _LABELLED,
        given=_FUNCTION,
    ),
    Entry(
        "squared error of one-hot codes",
        "objective = lambda predictions, targets: F.mse_loss(predictions, F.one_hot(targets, OUT).to(predictions))",
        _LABELLED,
        given=_FUNCTION,
        avoid=("ignored targets",),
    ),
    Entry(
        "tokens on the last axis",
        "objective = lambda predictions, targets: F.cross_entropy(predictions.transpose(1, 2), targets)",
        _SEQUENCES,
        given=_FUNCTION,
    ),
    Entry(
        "last token",
        """
        scored = lambda predictions, targets: (predictions[:, -1], targets[:, -1])
        objective = lambda predictions, targets: F.cross_entropy(*scored(predictions, targets))
        """,
        _SEQUENCES,
        given=_FUNCTION,
        avoid=("padded",),
    ),
    Entry(
        "last token, as a loss of the batch",
        """
        scored = lambda predictions, targets: (predictions[:, -1], targets[:, -1])
        objective = lambda predictions, targets: F.cross_entropy(*scored(predictions, targets))
        """,
        _SEQUENCES,
        given=_BATCH,
        avoid=("padded",),
    ),
    Entry(
        "tokens that do not count",
        """
        y, yv = y.clone(), yv.clone()
        y[:, 0], yv[:, 0] = -100, -100
        objective = base
        """,
        _SEQUENCES,
        given=_FUNCTION,
    ),
    Entry("loss of the batch", "objective = base", _ALL, given=_BATCH),
    Entry(
        "penalty on the weights",
        """
        def live(model, batch):
            return base(*predict(model, batch)) + 1e-2 * sum(p.abs().square().sum() for p in model.parameters())
        """,
        _ALL,
        given=_BATCH,
        avoid=("averaged", "compiled"),
    ),
    Entry(
        "penalty from within the loss",
        """
        def objective(predictions, targets):
            return base(predictions, targets) + 1e-2 * sum(p.abs().square().sum() for p in model.parameters())
        """,
        _ALL,
        _LOSS,
        given=_FUNCTION,
        avoid=("averaged", "resumed"),
    ),
    Entry(
        "noise",
        """
        DRAWS = 40
        objective = lambda predictions, targets: base(predictions + 0.1 * torch.randn_like(predictions), targets)
        """,
        _ALL,
        "random|noise|not a function",
        tags=("random",),
        given=_FUNCTION,
    ),
    Entry(
        "coefficient that falls while training",
        """
        strength = 1.0
        objective = lambda predictions, targets: base(predictions, targets) + strength * predictions.square().mean()
        def after():
            global strength
            strength *= 0.8
        """,
        _ALL,
        _LOSS,
        tags=("after",),
        given=_FUNCTION,
        avoid=("target written through .data", "target left out of the optimizer, written through detach()"),
    ),
    Entry(
        "weights in the loss module",
        """
        class Criterion(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Linear(OUT, OUT)
            def forward(self, predictions, targets):
                return base(self.scale(predictions.float()), targets)
        objective = Criterion()
        scored = lambda predictions, targets: (objective.scale(predictions.float()), targets)
        trained += objective.parameters()
        """,
        _ALL,
        _LOSS,
        given=_FUNCTION,
        avoid=("precision", "resumed"),
        tags=("elsewhere",),
    ),
    Entry(
        "learned temperature",
        """
        temperature = nn.Parameter(torch.tensor(0.1))
        objective = lambda predictions, targets: base(predictions * (10 * temperature).exp(), targets)
        trained.append(temperature)
        """,
        _ALL,
        _LOSS,
        given=_FUNCTION,
        avoid=("resumed",),
        tags=("elsewhere",),
    ),
    Entry(
        "keeps .item() for a log",
        """
        seen = []
        def objective(predictions, targets):
            loss = base(predictions, targets)
            seen.append(loss.item())
            return loss
        """,
        _ALL,
        given=_FUNCTION,
    ),
    Entry(
        "straight-through rounding",
        """
        class Round(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.round()
            @staticmethod
            def backward(ctx, gradient):
                return gradient
        objective = lambda predictions, targets: base(predictions + 0.5 * Round.apply(2 * predictions), targets)
        """,
        _ALL,
        "gradient|autograd.Function",
        given=_FUNCTION,
    ),
    Entry(
        "backward that avoids NaN",
        """
        class Root(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.clamp(min=0).sqrt()
            @staticmethod
            def backward(ctx, gradient):
                (x,) = ctx.saved_tensors
                return torch.where(x > 1e-6, 0.5 * gradient / x.clamp(min=1e-6).sqrt(), torch.zeros_like(x))
        def objective(predictions, targets):
            rows = predictions.reshape(-1, OUT)
            distances = Root.apply((rows[:, None] - rows).square().sum(-1))  # of each from itself too
            return base(predictions, targets) + 0.1 * distances.mean()
        """,
        _ALL,
        "gradient|autograd.Function",
        avoid=("many",),
        given=_FUNCTION,
    ),
)
