"""Give `groktrace import` checkpoints as a stranger might write them, and damage good ones byte by byte.

    python -m tools.torture checkpoints --count 20000

What is imported is refused or left out by name; no code of a checkpoint runs, nothing outside of the run directory is
written, no more memory is taken than the file is large and 200 MB, and a run that is there already stays as it is.
"""

import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import groktrace
from groktrace.errors import GroktraceError
from groktrace.importing import plan
from groktrace.importing.find import open_checkpoint
from groktrace.importing.names import match_names
from groktrace.importing.network import Network, prepare_network
from groktrace.importing.plan import import_checkpoints
from groktrace.importing.steps import recorded_step
from tools.torture.hostile_files import ADDRESS_SPACE, Watch, memory
from tools.torture.tally import Tally, seed_option

MEMORY = 200 * 10**6
SECONDS = 600
STEP = 5
Make = Callable[[Path], Any]
SCALAR = np.float64(0).__reduce__()[0]  # what makes NumPy's numbers of a pickle


def network() -> nn.Module:
    """The network that is trained, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))


def task() -> groktrace.Task:
    """Its loss on a few samples."""
    x = torch.linspace(-1, 1, 16).reshape(8, 2)
    return groktrace.Task.from_model(network(), train=(x, x), loss="mse")


def content(**more: Any) -> dict[str, Any]:
    """What a training loop saves."""
    return {"model": network().state_dict(), "step": STEP} | more


class Code:
    """What a pickle may do where it is opened without care."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def sharded(folder: Path, place: str) -> None:
    """A folder whose index says that all weights are in one file."""
    (folder / "5").mkdir()
    save_file(network().state_dict(), folder / "5" / "part.safetensors")
    index = {"weight_map": dict.fromkeys(network().state_dict(), place)}
    (folder / "5" / "model.safetensors.index.json").write_text(json.dumps(index))


def trainer(folder: Path, state: str = '{"global_step": 5, "log_history": []}') -> None:
    """A folder as transformers' Trainer writes it."""
    (folder / "checkpoint-5").mkdir()
    save_file(network().state_dict(), folder / "checkpoint-5" / "model.safetensors")
    (folder / "checkpoint-5" / "trainer_state.json").write_text(state)
    torch.save(
        {"state": {}, "param_groups": [{"lr": 0.1, "weight_decay": 0.0}]}, folder / "checkpoint-5" / "optimizer.pt"
    )


def distributed(folder: Path, **more: Any) -> Path:
    """A folder of torch.distributed.checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content(**more), checkpoint_id=folder / "5")
    return folder / "5"


# One good checkpoint of each format.
GOOD: dict[str, Make] = {
    "torch.save": lambda folder: torch.save(content(), folder / "5.pt"),
    "torch.save, old": lambda folder: torch.save(content(), folder / "5.pt", _use_new_zipfile_serialization=False),
    "Lightning": lambda folder: torch.save(
        {"state_dict": content()["model"], "global_step": STEP, "pytorch-lightning_version": "2.6"}, folder / "5.ckpt"
    ),
    "safetensors": lambda folder: save_file(network().state_dict(), folder / "5.safetensors"),
    "shards": lambda folder: sharded(folder, "part.safetensors"),
    "transformers": trainer,
    "DCP": distributed,
}


def wrong(**tensors: Any) -> Make:
    """A checkpoint with other tensors in place of the network's."""
    return lambda folder: torch.save(content(model=network().state_dict() | tensors), folder / "5.pt")


def said(step: Any) -> Make:
    """A checkpoint that says it is of a step."""
    return lambda folder: torch.save(content(step=step), folder / "5.pt")


def packed(folder: Path) -> None:
    """An archive that unpacks to much more than it has."""
    with zipfile.ZipFile(folder / "5.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for i in range(4):
            archive.writestr(f"5/data/{i}", bytes(2**28))
        archive.writestr("5/data.pkl", pickle.dumps({}, 2))


def declared(folder: Path) -> None:
    """An archive whose directory says that each of its entries has a terabyte."""
    torch.save(content(), folder / "5.pt")
    data = bytearray((folder / "5.pt").read_bytes())
    place = -1
    while (place := data.find(b"PK\1\2", place + 1)) >= 0:
        name, extra = struct.unpack("<HH", data[place + 28 : place + 32])
        data[place + 20 : place + 28] = b"\xff" * 8
        data[place + 30 : place + 32] = struct.pack("<H", extra + 20)
        end = place + 46 + name
        data[end:end] = struct.pack("<HHQQ", 1, 16, 2**40, 2**40)
    (folder / "5.pt").write_bytes(data)


def expanded(folder: Path) -> None:
    """Tensors of 2⁶⁰ elements, all of which are one number in the file."""
    tensors = {name: torch.ones(1).expand(2**30, 2**30) for name in network().state_dict()}
    torch.save(content(model=tensors), folder / "5.pt")


def nested(folder: Path) -> None:
    """Lists of lists of lists, each of which the file holds once."""
    inner: Any = [torch.ones(1)]
    for _ in range(12):
        inner = [inner] * 50
    torch.save(content(more=inner), folder / "5.pt")


def huge_header(folder: Path) -> None:
    """A safetensors file whose header says that a tensor has terabytes."""
    header = json.dumps({"0.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "5.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def described(change: Callable[[Any], Any]) -> Make:
    """A DCP folder whose description a stranger has changed."""

    def make(folder: Path) -> None:
        path = distributed(folder) / ".metadata"
        found = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(change(found) or found))

    return make


def of_all_places(**entries: Any) -> Make:
    """A DCP folder whose pieces lie elsewhere, it says."""
    return described(lambda found: [vars(place).update(entries) for place in found.storage_data.values()] and None)


def of_all_shapes(size: list[int]) -> Make:
    """A DCP folder whose tensors are large, it says."""
    return described(
        lambda found: (
            [vars(entry).update(size=size) for entry in found.state_dict_metadata.values() if hasattr(entry, "size")]
            and None
        )
    )


def hostile(made: Path) -> dict[str, Make]:
    """Checkpoints that have to be refused.

    Args:
        made: a folder that their code would make.
    """
    code = Code(os.mkdir, str(made))
    run = Code(exec, f"import os; os.mkdir({str(made)!r})")
    return {
        "NumPy objects": lambda folder: torch.save(content(more=np.array([code], dtype=object)), folder / "5.pt"),
        "a NumPy number of an object": said(Code(SCALAR, np.dtype(object), code)),
        "a NumPy number of a gigabyte": said(Code(SCALAR, Code(np.dtype, f"V{2**30}"))),
        "a NumPy number without bytes": said(Code(SCALAR, np.dtype("f8"), b"")),
        "a NumPy step that is no number": said(np.float64("nan")),
        "code beside the weights": lambda folder: torch.save(content(more=code), folder / "5.pt"),
        "code in an old file": lambda folder: torch.save(
            content(more=run), folder / "5.pt", _use_new_zipfile_serialization=False
        ),
        "code as a plain pickle": lambda folder: (folder / "5.pt").write_bytes(pickle.dumps(content(more=run))),
        "code for weights": wrong(**{"0.weight": code}),
        "a module": lambda folder: torch.save(network(), folder / "5.pt"),
        "code in shards": lambda folder: (
            sharded(folder, "x.bin"),
            torch.save(content(more=run), folder / "5" / "x.bin"),
        ),
        "code in a DCP description": described(lambda found: vars(found).update(planner_data=run)),
        "code for a DCP description": described(lambda found: code),
        "an archive of a gigabyte": packed,
        "an archive of terabytes": declared,
        "tensors of exabytes": expanded,
        "lists without end": nested,
        "a bytearray of terabytes": lambda folder: torch.save(content(more=Code(bytearray, 2**40)), folder / "5.pt"),
        "a tensor of terabytes": lambda folder: torch.save(
            content(more=Code(torch.FloatTensor, 2**40)), folder / "5.pt"
        ),
        "a header of terabytes": huge_header,
        "DCP tensors of exabytes": of_all_shapes([2**30, 2**30]),
        "an index out of the folder": lambda folder: sharded(folder, "../../whole.safetensors"),
        "an index of /dev/zero": lambda folder: sharded(folder, "/dev/zero"),
        "DCP pieces out of the folder": of_all_places(relative_path="../../whole.pt"),
        "DCP pieces without end": of_all_places(length=2**50),
        "another shape": wrong(**{"0.weight": torch.ones(3, 3)}),
        "another dtype": wrong(**{"0.weight": torch.ones(3, 2, dtype=torch.complex64)}),
        "a layer too many": wrong(**{"4.weight": torch.ones(2, 2)}),
        "no weights": lambda folder: torch.save({"step": STEP}, folder / "5.pt"),
        "step NaN": said(math.nan),
        "step infinite": said(math.inf),
        "step negative": said(-1),
        "step a fraction": said(torch.tensor(0.5)),
        "step too large": said(10**400),
        "NaN in trainer_state.json": lambda folder: trainer(folder, '{"global_step": NaN}'),
        "step NaN in a trainer_state.json": lambda folder: trainer(folder, '{"global_step": -7}'),
        "two of one step": lambda folder: [torch.save(content(), folder / name) for name in ("a.pt", "b.pt")],
        "an empty file": lambda folder: (folder / "5.pt").touch(),
        "a pipe": lambda folder: os.mkfifo(folder / "5.pt"),
    }


def attempt(action: Callable[[], Any], watch: Watch, size: int) -> tuple[str, str | None]:
    """Import something, and watch: how it ended, and what was wrong with that."""
    watch.noted, resident = [], memory(reset=True)
    watch.active = True
    try:
        action()
        outcome, fault = "accepted", None
    except GroktraceError as refusal:
        outcome, fault = "refused", None if len(str(refusal).splitlines()) == 1 else f"several lines: {refusal}"
    except Exception as failure:
        outcome, fault = "failed", f"{type(failure).__name__}: {failure}"
    watch.active = False
    if watch.noted:
        fault = watch.noted[0]
    elif (took := memory() - resident) > size + MEMORY:
        fault = f"took {took / 1e6:.0f} MB"
    return outcome, fault


def read(path: Path, prepared: Network) -> None:
    """All that an import reads of a checkpoint."""
    contents = open_checkpoint(path)
    recorded_step(path, contents)
    dict(contents.values)
    prepared.read(match_names(contents, prepared.wanted, None, str(path)), str(path))


def damages(root: Path, count: int, seed: int) -> Iterator[tuple[str, Path, Path]]:
    """Good checkpoints, one file of which has a byte changed or its end cut off: format, checkpoint, file."""
    draw = random.Random(seed)
    places = {}
    for number, (name, make) in enumerate(GOOD.items()):
        places[name] = root / f"good{number}"
        places[name].mkdir()
        make(places[name])
    for _ in range(count):
        name = draw.choice(list(places))
        path = draw.choice([path for path in sorted(places[name].rglob("*")) if path.is_file()])
        whole = path.read_bytes()
        damaged = bytearray(whole)
        if draw.random() < 0.2:
            damaged = damaged[: draw.randrange(len(whole))]
        else:
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        yield name, next(places[name].iterdir()), path
        path.write_bytes(whole)


def files_of(root: Path) -> dict[Path, bytes]:
    """All files of a folder."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def work(root: Path, count: int, seed: int, found: Any) -> None:
    """Try everything; what was tried, and what was wrong, goes into a queue."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    (root / "good").mkdir()
    GOOD["DCP"](root / "good")
    given = task()
    run = import_checkpoints(root / "good", task=given, out=root / "run")  # and loads what it needs
    save_file(network().state_dict(), root / "whole.safetensors")
    torch.save(content(), root / "whole.pt")
    before, prepared, watch = files_of(run.root), prepare_network(given), Watch(root)
    plan.prepare_network = lambda _: prepared  # traced once
    for number, (name, make) in enumerate(hostile(root / "made").items()):
        folder = root / f"hostile{number}"
        folder.mkdir()
        make(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for out in (root / "run", root / f"out{number}"):
            outcome, fault = attempt(partial(import_checkpoints, folder, task=given, out=out), watch, size)
            if outcome == "accepted":
                fault = "was accepted"
            if (root / "made").exists() or (root / f"out{number}").exists() or files_of(run.root) != before:
                fault = fault or "something was run, written, or lost"
            found.put(("hostile checkpoints refused", name, fault))
    for name, checkpoint, path in damages(root, count, seed):
        size = path.stat().st_size
        outcome, fault = attempt(partial(read, checkpoint, prepared), watch, size)
        found.put((f"damaged ones {outcome}", f"{name}, {path.name}", fault))
    found.put(None)


@click.command("checkpoints")
@click.option("--count", default=20_000, show_default=True, help="Damaged checkpoints.")
@seed_option
def checkpoints(count: int, seed: int) -> None:
    """Import checkpoints as a stranger might write them: refused by name, nothing run, nothing lost."""
    tally = Tally("checkpoints")
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=work, args=(Path(folder), count, seed, found))
        process.start()
        while True:
            try:
                message = found.get(timeout=SECONDS if process.is_alive() else 1)
            except Exception:  # it takes too long, or has crashed
                tally.expect(False, f"the process came to its end, after {dict(tally.counts)}")
                break
            if message is None:
                break
            kind, name, fault = message
            tally.counts[kind] += 1
            tally.expect(fault is None, f"{name}: {fault}")
        process.join(10)
        process.kill()
        process.join()
    tally.finish()
