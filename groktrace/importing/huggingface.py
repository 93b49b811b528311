"""Folders as transformers' Trainer writes them (checkpoint-500/), and weights cut into several files by an index."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from groktrace.importing import safetensors_file, torch_file
from groktrace.importing.contents import CheckpointError, Contents, StoredTensor, flatten
from groktrace.run.files import read_unverified

INDEX_SUFFIX = ".index.json"
STATE_FILE, OPTIMIZER_FILE = "trainer_state.json", "optimizer.pt"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
NAMES = tuple(name for weights in _WEIGHTS for name in (weights, weights + INDEX_SUFFIX))


def weights_file(folder: Path) -> Path | None:
    """The file of a folder that holds the weights, or says which do; None where the folder is no checkpoint."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def open_folder(folder: Path) -> Contents:
    """Weights of a folder, the step and the numbers that its trainer noted, and the optimizer's state.

    Raises:
        CheckpointError: one of its files is missing or damaged.
    """
    path = weights_file(folder)
    if path is None:
        raise CheckpointError(f"{folder}: expected one of {', '.join(NAMES)} in it.")
    opened = open_weights(path)
    values: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    if (folder / STATE_FILE).exists():
        state = read_unverified(folder / STATE_FILE, CheckpointError)
        if isinstance(state, dict):
            values["global_step"] = state.get("global_step")
            metrics = _logged(state)
    if (folder / OPTIMIZER_FILE).exists():
        try:
            optimizer = flatten({"optimizer": torch_file.load(folder / OPTIMIZER_FILE)}, folder / OPTIMIZER_FILE)
            values |= optimizer.values
        except CheckpointError:  # the weights do not need it
            pass
    return replace(opened, values=values, metrics=metrics)


def _logged(state: dict[str, Any]) -> dict[str, float]:
    """What the trainer logged at the step of the checkpoint."""
    found: dict[str, float] = {}
    history, step = state.get("log_history"), state.get("global_step")
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, dict) and entry.get("step") == step:
            found |= {str(k): float(v) for k, v in entry.items() if k != "step" and type(v) in (int, float)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def open_weights(path: Path) -> Contents:
    """A file of weights, or several that an index names.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    if path.suffix == safetensors_file.SUFFIX:
        return safetensors_file.open_file(path)
    return torch_file.open_file(path)


def _open_shards(index: Path) -> Contents:
    """The tensors of several files; each is where the index says."""
    listed = read_unverified(index, CheckpointError)
    match listed:
        case {"weight_map": dict(places)} if all(isinstance(place, str) for place in places.values()):
            pass
        case _:
            raise CheckpointError(f"{index}: expected a 'weight_map' of names and files.")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names the file '{name}', which is not beside it; nothing else is read.")
        shard = open_weights(index.parent / name).tensors if not name.endswith(INDEX_SUFFIX) else {}
        tensors |= {key: tensor for key, tensor in shard.items() if places.get(key) == name}
    if missing := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{index}: names tensors that its files do not hold: {', '.join(missing[:5])}.")
    return Contents(tensors)
