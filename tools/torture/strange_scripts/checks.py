"""What groktrace says of a script's training, held against what the script knows of itself."""

import math
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import groktrace
from tools.torture.strange_scripts.generate import Script
from tools.torture.strange_scripts.truth import State, Truth

EVERY = 4
# Of a point's reasons those that say nothing against λ̂ and λ_c of a quadratic loss, or against the weights' spread.
HARMLESS = (
    "not at a minimum",
    "perhaps not at a minimum",
    "too few draws",
    "not local",
    "no basin",
    "left the basin",
    "leaving the basin",
)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are bitwise the same; what is not a number equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def differences(script: Script, module: types.ModuleType) -> Iterator[str]:
    """What differs from the truth, a line each; what is not told begins with "unknown".

    Args:
        script: the script.
        module: its variables, once it has run.
    """
    truth: Truth = module.truth
    if Path("run/run.json").exists():
        run = groktrace.open_run("run")
        samples = len(module.real(module.x, module.y)[0])
        if run.info["n"] != samples and "weighted" not in script.tags:
            yield f"n = {run.info['n']}, in truth {samples}"
        yield from _wrong_snapshots(script, run, truth)
        yield from _wrong_gradient(script, run, truth)
    yield from _not_a_mean(script, module)
    found = getattr(module, "found", None)
    if found is not None:
        points = found["trajectory"] if isinstance(found, dict) else [point.to_dict() for point in found.points]
        missing = _due(script, truth) - {point["step"] for point in points}
        if missing:
            yield f"no results for steps {sorted(missing)}"
        yield from _summary(
            (point["step"], wrong)
            for point in points
            for wrong in _wrong_point(script, point, _states(script, truth, point["step"]))
        )
    estimate = getattr(module, "estimate", None)
    if estimate is not None:
        yield from _wrong_point(script, {**estimate.to_dict(), "train_loss": estimate.loss}, [truth.end])


def _summary(wrong: Iterator[tuple[int, str]]) -> Iterator[str]:
    """One line for each kind of fault, with the first step and how many more."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for step, line in wrong:
        kinds.setdefault(line.split("=")[0], []).append((step, line))
    for (step, line), *more in kinds.values():
        yield f"{line} at step {step}" + (f" and {len(more)} more" if more else "")


def _wrong_snapshots(script: Script, run: groktrace.run.store.Run, truth: Truth) -> Iterator[str]:
    steps = {snapshot.step for snapshot in run.snapshots}
    if missing := _due(script, truth) - steps:
        yield f"no snapshots of steps {sorted(missing)}"
    if steps - truth.states.keys():
        yield f"snapshots of steps {sorted(steps - truth.states.keys())}, where {truth.updates} updates were made"
    other = []
    for snapshot in run.snapshots:
        weights, metrics = snapshot.load(), snapshot.metrics()
        states = truth.states.get(snapshot.step, [])
        if states and not any(_holds(weights, state, truth) for state in states):
            other.append(snapshot.step)
        for name, value in truth.logged.get(snapshot.step, {}).items():
            if isinstance(value, float) and metrics.get(name) != value:
                yield f"metric {name} = {metrics.get(name)}, in truth {value}, at step {snapshot.step}"
    if other:
        yield f"other weights under steps {other}"
    trained = {name for name, spec in run.specs.items() if spec.trainable}
    if truth.memory(trained) != truth.memory(truth.ever):
        yield f"trained weights = {sorted(trained)}, in truth {sorted(truth.ever)}"


def _wrong_gradient(script: Script, run: groktrace.run.store.Run, truth: Truth) -> Iterator[str]:
    """The gradient of the recorded program, with which the chains move, beside that of the script's own loss."""
    last = run.snapshots[-1]
    weights, states = last.load(with_loss=True), truth.states.get(last.step, [])
    states = [state for state in states if _holds(weights, state, truth)]
    unlike = {"random", "many", "views", "complex", "precision"} & script.tags
    if unlike or not states or not (run.root / "program.json").exists():
        return
    names = [name for name in states[-1].gradients if name in weights]
    weights |= {name: weights[name].requires_grad_() for name in names}
    loss, _ = run.task.forward(weights, run.task.train.tensors)
    found = torch.autograd.grad(loss, [weights[n] for n in names], allow_unused=True, materialize_grads=True)
    found = torch.cat([tensor.flatten() for tensor in found])
    true = [torch.cat([state.gradients[name].flatten() for name in names]) for state in states]
    off = min(float((found - gradient).norm() / gradient.norm().clamp_min(1e-6)) for gradient in true)
    if not off <= 1e-2:  # nor where it is not a number
        yield f"gradient at step {last.step} is off by {off:.2g} of its norm"


def _due(script: Script, truth: Truth) -> set[int]:
    """The steps that have to be there; the last where the recording was closed before it was read."""
    due = {truth.first, *range(truth.first + -truth.first % EVERY, truth.updates + 1, EVERY)}
    return due if "open" in script.tags else due | {truth.updates}


def _holds(weights: dict[str, torch.Tensor], state: State, truth: Truth) -> bool:
    """Whether a snapshot's weights are those of the state; complex ones may be pairs, tied ones may stand once."""
    for name, tensor in state.weights.items():
        kept = weights.get(name)
        if kept is None:
            if not truth.memory([name]) & truth.memory(weights):
                return False
            continue
        pairs = tensor.is_complex() and not kept.is_complex()
        if not equal(torch.view_as_real(tensor) if pairs else tensor, kept):
            return False
    return True


def _not_a_mean(script: Script, module: types.ModuleType) -> Iterator[str]:
    """A loss that doubles with the samples is no mean."""
    if "summed" in script.tags:
        x, y = module.real(module.x, module.y)
        with torch.no_grad():
            module.model.eval()
            once = float(module.live(module.model, module.pack(x, y)))
            twice = float(module.live(module.model, module.pack(torch.cat([x, x]), torch.cat([y, y]))))
        if abs(twice - once) > 0.01 * abs(once):
            yield f"the loss is a sum: {once:.4g} of all samples, {twice:.4g} of all twice"


def _states(script: Script, truth: Truth, step: int) -> list[State]:
    """What the network was after that many updates; weights that train only later, or did before, may be sampled."""
    states = list(truth.states.get(step, []))
    if "late" in script.tags:
        for state in truth.states.get(step, []):
            flat = torch.cat([state.weights[name].flatten().double() for name in truth.ever])
            states.append(replace(state, size=len(flat), norm=float(flat.norm())))
    return states


def _wrong_point(script: Script, point: dict[str, Any], states: list[State]) -> Iterator[str]:
    """What differs at one snapshot from each of the states that the network was in after that many updates."""
    best: list[str] | None = None
    for state in states:
        wrong = list(_off(script, point, state))
        if best is None or len(wrong) < len(best):
            best = wrong
    yield from best or []


def _off(script: Script, point: dict[str, Any], state: State) -> Iterator[str]:
    for name, values in (("train_loss", state.losses), ("val_loss", state.val_losses)):
        if name in point:
            found, true = point[name], float(values.mean())
            spread = 5 * float(values.std()) if len(values) > 1 else 0.0
            if found is None:
                if math.isfinite(true):
                    yield f"unknown {name}"
            elif not abs(found - true) <= script.tolerance * abs(true) + spread + 1e-6:
                yield f"{name} = {found:.5g}, in truth {true:.5g}"
    for name, true in (("train_accuracy", state.accuracy), ("val_accuracy", state.val_accuracy)):
        if name in point and true is not None and "random" not in script.tags:
            if point[name] is None:
                yield f"unknown {name}"
            elif abs(point[name] - true) > (0.1 if script.tolerance > 1e-3 else 1e-6):
                yield f"{name} = {point[name]:.4g}, in truth {true:.4g}"
    yield from _wrong_estimate(script, point, state)


def _wrong_estimate(script: Script, point: dict[str, Any], state: State) -> Iterator[str]:
    settings = script.settings
    harmless = all(reason.startswith(HARMLESS) for reason in point["reasons"])
    if not harmless or point["llc"] is None or "elsewhere" in script.tags:
        return
    if state.llc is not None:
        # λ̂ is an expectation that is known whether or not the snapshot is at a minimum.
        llc, centred = state.llc(settings["nbeta"], settings["localization"])
        for name, error, true in (("llc", "stderr", llc), ("llc_centred", "stderr_centred", centred)):
            if abs(point[name] - true) > 4 * point[error] + 0.03 * centred:
                yield f"{name} = {point[name]:.3f} ± {point[error]:.3f}, in truth {true:.3f}"
    elif point["diagnostics"].get("distance") is not None:
        # With hardly any pull of the loss, E‖w − w*‖² = D/γ.
        found = (point["diagnostics"]["distance"] * state.norm) ** 2 * settings["localization"]
        draws = settings["chains"] * settings["draws"] / 4
        if abs(found - state.size) > state.size * (4 * math.sqrt(2 / (state.size * draws)) + 0.02):
            yield f"sampled weights = {found:.1f}, in truth {state.size}"
