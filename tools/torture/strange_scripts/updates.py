"""Training loops whose updates are strange to count, each as the lines that a script has for it."""

from tools.torture.strange_scripts.entries import Entry

_STEPS = "optimizer|update|step"

UPDATE_LOOPS = (
    Entry(
        "accumulated gradients",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for index, batch in enumerate(batches(3 * UPDATES)):
            if index % 3 == 0:
                optimizer.zero_grad()
            (live(model, batch) / 3).backward()
            if index % 3 == 2:
                optimizer.step()
                done()
        """,
    ),
    Entry(
        "optimizer replaced",
        """
        optimizer = torch.optim.Adam(trained, lr=0.01)
        recorder = watch(model, optimizer)
        for index, batch in enumerate(batches(UPDATES)):
            if index == 5:
                optimizer = torch.optim.SGD(trained, lr=0.01)
            backward(batch)
            optimizer.step()
            done()
        """,
        matter=_STEPS,
    ),
    Entry(
        "two optimizers, each for some weights",
        """
        optimizers = [make(trained[::2]), make(trained[1::2])]
        recorder = watch(model, optimizers[-1])
        for batch in batches(UPDATES):
            backward(batch)
            for optimizer in optimizers:
                optimizer.step()
            done()
        """,
        avoid=("single", "views"),
    ),
    Entry(
        "an optimizer for each weight, within the backward pass",
        """
        for parameter in trained:
            def update(parameter, optimizer=torch.optim.SGD([parameter], lr=0.03)):
                optimizer.step()
                optimizer.zero_grad()
            parameter.register_post_accumulate_grad_hook(update)
        recorder = watch(model, None)
        for batch in batches(UPDATES):
            live(model, batch).backward()
            recorder.step()
            done()
        """,
        avoid=("left out", "views"),
    ),
    Entry(
        "by hand",
        """
        recorder = watch(model, None)
        for batch in batches(UPDATES):
            backward(batch)
            with torch.no_grad():
                for parameter in trained:
                    if parameter.grad is not None:
                        parameter -= 0.03 * parameter.grad
            recorder.step()
            done()
        """,
        avoid=("left out",),
    ),
    Entry(
        "no one counts",
        """
        optimizer = make(trained)
        recorder = watch(model, None)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done()
        """,
        matter=_STEPS,
        avoid=("left out", "open"),
    ),
    Entry(
        "sharpness-aware, the wrapper watched",
        """
        class SAM(torch.optim.Optimizer):
            def __init__(self, parameters):
                super().__init__(parameters, {"rho": 0.05})
                self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.03)
                self.param_groups = self.base_optimizer.param_groups
            @torch.no_grad()
            def first_step(self):
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            self.state[p]["old"] = p.clone()
                            p.add_(group["rho"] * p.grad / (p.grad.norm() + 1e-9))
            @torch.no_grad()
            def second_step(self):
                for p, state in self.state.items():
                    p.copy_(state["old"])
                self.base_optimizer.step()
        optimizer = SAM(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.first_step()
            backward(batch)
            optimizer.second_step()
            done()
        """,
        matter=_STEPS,
        avoid=("views",),
    ),
    Entry(
        "sharpness-aware, the base optimizer watched",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            backward(batch)
            moves = [torch.zeros_like(p) if p.grad is None else 0.05 * p.grad / (p.grad.norm() + 1e-9) for p in trained]
            with torch.no_grad():
                torch._foreach_add_(trained, moves)
            backward(batch)
            with torch.no_grad():
                torch._foreach_sub_(trained, moves)
            optimizer.step()
            done()
        """,
        avoid=("precision",),
    ),
    Entry(
        "sharpness-aware, two steps of one optimizer",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES // 2):
            backward(batch)
            before = [p.detach().clone() for p in trained]
            optimizer.step()
            done()
            backward(batch)
            with torch.no_grad():
                torch._foreach_copy_(trained, before)
            optimizer.step()
            done()
        """,
    ),
    Entry(
        "LBFGS",
        """
        optimizer = torch.optim.LBFGS(trained, lr=0.1, max_iter=3)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            optimizer.step(lambda batch=batch: backward(batch))
            done()
        """,
        avoid=("views", "complex", "random", "precision"),
    ),
    Entry(
        "gradient scaler that skips",
        """
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        scaler = torch.amp.GradScaler("cpu")
        recorder = watch(model, optimizer)
        for index, batch in enumerate(batches(UPDATES + 2)):
            optimizer.zero_grad()
            skipped = index in (3, 6)
            scaler.scale(live(model, batch) * (float("inf") if skipped else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            if not skipped:
                done()
        """,
        avoid=("precision", "complex", "summed"),
    ),
    Entry(
        "fused optimizer that skips",
        """
        optimizer = torch.optim.AdamW(trained, lr=0.01, fused=True)
        scaler = torch.amp.GradScaler("cpu")
        recorder = watch(model, optimizer)
        for index, batch in enumerate(batches(UPDATES + 2)):
            optimizer.zero_grad()
            skipped = index in (3, 6)
            scaler.scale(live(model, batch) * (float("inf") if skipped else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            if not skipped:
                done()
        """,
        avoid=("precision", "complex", "summed", "views"),
    ),
    Entry(
        "wrapped optimizer",
        """
        class Wrapper:
            def __init__(self, optimizer):
                self.optimizer = optimizer
            def step(self):
                self.optimizer.step()
        optimizer = Wrapper(make(trained))
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done()
        """,
    ),
    Entry(
        "optimizer derived from another",
        """
        class Mine(torch.optim.Adam):
            def step(self, closure=None):
                return super().step(closure)
        torch.optim.Adam([nn.Parameter(torch.zeros(1))]).step()
        optimizer = Mine(trained, lr=0.01)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done()
        """,
    ),
    Entry(
        "a step that fails",
        """
        class Fragile(torch.optim.SGD):
            def step(self, closure=None):
                if truth.updates == 5 and not failures:
                    failures.append("out of memory")
                    raise RuntimeError("out of memory")
                return super().step(closure)
        failures = []
        optimizer = Fragile(trained, lr=0.03)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES + 1):
            backward(batch)
            try:
                optimizer.step()
            except RuntimeError:
                continue
            done()
        """,
    ),
)
