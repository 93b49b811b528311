"""Training loops, each as the lines that a script has for it.

`backward(batch)` fills the gradients, `done()` says that one more update is done, and `trained` holds the parameters
that optimizers have.
"""

from tools.torture.strange_scripts.entries import Entry

LOOPS = (
    Entry(
        "minibatches",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done()
        """,
    ),
    Entry(
        "full batches",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for _ in range(UPDATES):
            backward(pack(*real(x, y)))
            optimizer.step()
            done()
        """,
    ),
    Entry(
        "within with",
        """
        optimizer = make(trained)
        with watch(model, optimizer) as recorder:
            for batch in batches(UPDATES):
                backward(batch)
                optimizer.step()
                done()
        """,
    ),
    Entry(
        "autocast",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = live(model, batch)
            loss.backward()
            optimizer.step()
            done()
        """,
        avoid=("precision", "complex"),
    ),
    Entry(
        "average swapped in at the end",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        average = copy.deepcopy(model.state_dict())
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done()
            average = {name: value.lerp(new, 0.5) if value.is_floating_point() else new.clone()
                       for (name, value), new in zip(average.items(), model.state_dict().values())}
        model.load_state_dict(average)
        """,
        matter="weights|moved|changed",
        avoid=("open", "views"),
    ),
    Entry(
        "best weights loaded at the end",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done()
            if truth.updates == 6:
                best = copy.deepcopy(model.state_dict())
        model.load_state_dict(best)
        """,
        matter="weights|moved|changed",
        avoid=("open",),
    ),
    Entry(
        "went back to the best weights",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done()
            if truth.updates == 3:
                best = copy.deepcopy(model.state_dict())
            if truth.updates == 6:
                model.load_state_dict(best)
        """,
    ),
    Entry(
        "learning rate schedule, logged",
        """
        optimizer = make(trained)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            loss = backward(batch)
            log(lr=schedule.get_last_lr()[0], loss=loss.item())
            optimizer.step()
            done()
            schedule.step()
        """,
    ),
    Entry(
        "logs words beside numbers",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            loss = backward(batch)
            log(phase="warm-up", loss=loss.item(), nothing=None)
            optimizer.step()
            done()
        """,
        matter="phase|log|metric",
    ),
    Entry(
        "clamped after the step",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        def clamp():
            for parameter in trained:
                parameter.data.mul_(0.9)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done(clamp)
        """,
        avoid=("views",),
    ),
    Entry(
        "compiled",
        """
        optimizer = make(trained)
        compiled = torch.compile(model, backend="eager")
        recorder = watch(compiled, optimizer)
        for batch in batches(UPDATES):
            optimizer.zero_grad()
            live(compiled, batch).backward()
            optimizer.step()
            done()
        """,
        tags=("compiled",),
        avoid=("complex",),
    ),
    Entry(
        "the loop fails",
        """
        optimizer = make(trained)
        try:
            with watch(model, optimizer) as recorder:
                for index, batch in enumerate(batches(UPDATES)):
                    if index == 7:
                        raise KeyboardInterrupt
                    backward(batch)
                    optimizer.step()
                    done()
        except KeyboardInterrupt:
            pass
        """,
        avoid=("open",),
    ),
    Entry(
        "watched again in mid-training",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for index, batch in enumerate(batches(UPDATES)):
            if index == 6:
                recorder = watch(model, optimizer)
            backward(batch)
            optimizer.step()
            done()
        """,
    ),
    Entry(
        "resumed with new objects",
        """
        optimizer = torch.optim.Adam(trained, lr=0.01)
        with watch(model, optimizer):
            for batch in batches(6):
                backward(batch)
                optimizer.step()
                done()
        state = optimizer.state_dict()
        kept = [name for name, p in model.named_parameters() if any(p is weight for weight in trained)]
        model = truth.model = copy.deepcopy(model)
        trained[:] = [dict(model.named_parameters())[name] for name in kept]
        optimizer = torch.optim.Adam(trained, lr=0.01)
        optimizer.load_state_dict(state)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES - 6):
            backward(batch)
            optimizer.step()
            done()
        """,
        tags=("resumed",),
        avoid=("elsewhere",),
    ),
    Entry(
        "watched after a warm-up",
        """
        optimizer = make(trained)
        for batch in batches(3):
            backward(batch)
            optimizer.step()
            done()
        recorder = watch(model, optimizer, start_step=3)
        for batch in batches(UPDATES - 3):
            backward(batch)
            optimizer.step()
            done()
        """,
    ),
    Entry(
        "average recorded",
        """
        optimizer = make(trained)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
        )
        truth.average = average.module
        recorder = watch(model, optimizer, weights=average)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            average.update_parameters(model)
            done()
        """,
        tags=("averaged",),
        avoid=("views", "complex", "elsewhere", "frozen layer", "open", "penalty from within the loss"),
    ),
    Entry(
        "frozen at first, then added to the optimizer",
        """
        late = [p for p in trained if p.requires_grad][-1]
        late.requires_grad_(False)
        trained[:] = [p for p in trained if p is not late]
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            if truth.updates == 5:
                optimizer.add_param_group({"params": [late.requires_grad_(True)]})
                trained.append(late)
            backward(batch)
            optimizer.step()
            done()
        """,
        tags=("late",),
        avoid=("left out", "single", "views", "complex", "elsewhere"),
    ),
    Entry(
        "frozen in mid-training",
        """
        optimizer = make(trained)
        recorder = watch(model, optimizer)
        for batch in batches(UPDATES):
            if truth.updates == 5:
                early = [p for p in trained if p.requires_grad][-1]
                early.requires_grad_(False)
                early.grad = None
            backward(batch)
            optimizer.step()
            done()
        """,
        tags=("late",),
        avoid=("left out", "single", "views", "complex", "elsewhere"),
    ),
    Entry(
        "slow weights that follow (lookahead)",
        """
        optimizer = make(trained)
        slow = [p.detach().clone() for p in trained]
        recorder = watch(model, optimizer)
        def follow():
            if truth.updates % 3 == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(slow, trained, 0.5)
                    torch._foreach_copy_(trained, slow)
        for batch in batches(UPDATES):
            backward(batch)
            optimizer.step()
            done(follow)
        """,
        avoid=("views", "precision", "complex"),
    ),
)
