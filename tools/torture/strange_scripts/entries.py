"""What a training script is put together from: an entry of each axis, for a problem."""

from dataclasses import dataclass

PROBLEMS = {
    "numbers": """
        OUT = 1
        teacher = torch.randn(5, 1)
        def draw(count):
            x = torch.randn(count, 5) * torch.tensor([1.0, 0.5, 1.5, 1.0, 0.7])
            return x, x @ teacher + 0.3 * torch.randn(count, 1)
        base = F.mse_loss
        """,
    "classes": """
        OUT = 3
        def draw(count):
            x = torch.randn(count, 5)
            return x, x[:, :3].argmax(1)
        base = F.cross_entropy
        """,
    "images": """
        OUT = 3
        def draw(count):
            x = torch.randn(count, 1, 6, 6)
            return x, x[:, 0, 0, :3].argmax(1)
        base = F.cross_entropy
        """,
    "tokens": """
        OUT = 7
        def draw(count):
            x = torch.randint(0, 7, (count, 4))
            return x, x.sum(1) % 7
        base = F.cross_entropy
        """,
    "sequences": """
        OUT = 7
        def draw(count):
            tokens = (torch.randint(0, 7, (count, 1)) + torch.randint(1, 4, (count, 1)) * torch.arange(7)) % 7
            return tokens[:, :-1], tokens[:, 1:]
        def base(predictions, targets):
            return F.cross_entropy(predictions.flatten(0, -2), targets.flatten())
        """,
}


@dataclass(frozen=True)
class Entry:
    """One choice on one axis.

    Attributes:
        name: what it is.
        code: the script's lines for it.
        problems: those that it fits.
        matter: where it may be refused, or its numbers may be off with a warning, the pattern that the words have to
            fit; None where all of it is plainly supported.
        tags: "linear" networks under "quadratic" losses have a λ that is known exactly; the others are for `avoid`.
        avoid: names and tags of entries on other axes that it does not go with.
        given: what watch() gets of a loss; "batch" of data whose batches only a batch loss takes; of a network what
            the loss sees of its outputs: "head" of them, or "logits".
        tolerance: relative, of a loss.
    """

    name: str
    code: str
    problems: tuple[str, ...] = tuple(PROBLEMS)
    matter: str | None = None
    tags: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    given: str = ""
    tolerance: float = 1e-3
