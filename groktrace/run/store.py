"""Read a run directory as hostile input: everything is checked before use."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groktrace.errors import RunError, SnapshotError, TaskError, printable
from groktrace.run import layout, pending
from groktrace.run.batch import Batch, check_lengths, unflatten
from groktrace.run.checkpoints import NO_RUN, refuse_checkpoints
from groktrace.run.files import beside, parse_json, read_json, read_metadata, read_tensors, read_unverified
from groktrace.run.info import WeightSpec, check_format, check_info
from groktrace.run.live_model import load_tensors
from groktrace.run.remote import Remote, is_url
from groktrace.run.task import SHIFT_INVARIANT_KEY, Task

if TYPE_CHECKING:
    from groktrace.analysis.results.draws import Draws
    from groktrace.analysis.results.trajectory import Trajectory

LINK_ADVICE = "out of the run directory, outside of which nothing is read or written; copy the run with cp -rL."


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The weights at one training step, read when asked for.

    Attributes:
        step: number of optimizer updates before this snapshot.
        path: its file.
        specs: the network's tensors, those of the loss among them.
        frozen: gives those that no snapshot needs to hold, since training leaves them as they are.
        remote: where the file has to be fetched from, if it is not here.
    """

    step: int
    path: Path
    specs: dict[str, WeightSpec]
    frozen: Callable[[], dict[str, Tensor]] = dict
    remote: Remote | None = None

    def load(self, *, with_loss: bool = False) -> dict[str, Tensor]:
        """The model's tensors by name, on the CPU: tied ones once, non-persistent buffers too; see `load_into`.

        Args:
            with_loss: with those of the loss, where it has weights of its own; the run's task needs them.

        Raises:
            SnapshotError: the file is damaged, or holds other tensors than the run's network has.
            RunError: the file of frozen tensors is damaged.
        """
        tensors = self._read()
        return {name: tensor for name, tensor in tensors.items() if with_loss or not self.specs[name].loss}

    def load_into(self, model: nn.Module) -> None:
        """Set a network to these weights in place: every parameter and buffer, non-persistent and tied ones too.

        Args:
            model: the recorded network, or one built like it; torch.compile and data-parallel wrappers do not matter.

        Raises:
            TaskError: it has other tensors, which the message names; it is left as it was.
            SnapshotError, RunError: see `load`.
        """
        load_tensors(model, self.load(), str(self.path))

    def fingerprint(self) -> str:
        """A digest of step and weights, from the file's header alone.

        Raises:
            SnapshotError: the header is damaged.
        """
        return hashlib.sha256(f"{self.step}:{self._metadata().get('digests')}".encode()).hexdigest()[:32]

    def metrics(self) -> dict[str, float]:
        """What the training script logged for this snapshot, from the file's header alone.

        Raises:
            SnapshotError: the header is damaged.
        """
        return self._metrics(self._metadata())

    def _metadata(self) -> dict[str, str]:
        """What the header says, which has a digest of its own; the weights are not read."""
        self._fetch()
        metadata = read_metadata(self.path, SnapshotError)
        self._check_step(metadata)
        return metadata

    def _check_step(self, metadata: dict[str, str]) -> None:
        if metadata.get("step") != str(self.step):
            raise SnapshotError(f"{self.path}: says it is of step {metadata.get('step')}, its name says {self.step}.")

    def _metrics(self, metadata: dict[str, str]) -> dict[str, float]:
        try:
            metrics = parse_json(metadata.get("metrics", "{}").encode())
            return {printable(key): math.nan if value is None else float(value) for key, value in metrics.items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as failure:
            raise SnapshotError(f"{self.path}: its logged metrics are damaged ({failure}).") from failure

    def _fetch(self) -> None:
        if self.path.is_symlink() and layout.leads_out(self.path.parent.parent, self.path):
            raise SnapshotError(f"{self.path}: a link {LINK_ADVICE}")
        if self.remote is not None:
            try:
                self.remote.fetch(self.path)
                self.remote.fetch(beside(self.path))
            except OSError as failure:
                raise SnapshotError(f"{self.path.name}: cannot be fetched ({failure}).") from failure

    def _read(self) -> dict[str, Tensor]:
        self._fetch()
        tensors, metadata = read_tensors(self.path, SnapshotError)
        self._check_step(metadata)
        self._metrics(metadata)  # damaged ones cost the snapshot before anything is made of it
        if tensors.keys() != self.specs.keys():
            tensors = self.frozen() | tensors
        if tensors.keys() != self.specs.keys():
            odd = sorted(tensors.keys() ^ self.specs.keys())
            raise SnapshotError(f"{self.path}: holds other tensors than run.json names: {', '.join(odd[:5])}.")
        for name, spec in self.specs.items():
            if tuple(tensors[name].shape) != spec.shape or tensors[name].dtype != spec.dtype:
                raise SnapshotError(
                    f"{self.path}: '{name}' should be {_describe(spec.shape, spec.dtype)} as run.json says, "
                    f"but is {_describe(tensors[name].shape, tensors[name].dtype)}."
                )
        # In one order, which that of a file is not: what is stacked from several snapshots may go by position.
        return {name: tensors[name] for name in self.specs}


@dataclass(frozen=True, eq=False)
class RecordedData:
    """The samples that a recording kept.

    Attributes:
        train: training samples; a random subset of large sets.
        val: validation samples, or None.
        n: number of training samples in truth.
        constants: the tensors that the recorded program refers to.
    """

    train: Batch
    val: Batch | None
    n: int
    constants: dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """A run directory, opened.

    Attributes:
        root: the directory; of a remote run, the local folder that its files pass through.
        info: run.json.
        specs: the network's tensors by name.
        snapshots: in step order.
        remote: where the run lies, if not in `root`.
    """

    root: Path
    info: dict[str, Any]
    specs: dict[str, WeightSpec]
    snapshots: tuple[Snapshot, ...]
    remote: Remote | None = None

    @property
    def name(self) -> str:
        """The path or URL of the run."""
        return str(self.root) if self.remote is None else self.remote.url

    @property
    def closed(self) -> bool:
        """Whether the recording said at its end that nothing more will come; one that was killed never does."""
        return self.info.get("closed") is not None

    @property
    def doubts(self) -> tuple[str, ...]:
        """What the recording found that its program, with which the analysis measures, no longer gives as trained."""
        return tuple(f"step {mark['step']}: {printable(mark['text'])}" for mark in self.info.get("doubts") or ())

    @property
    def weight_decay(self) -> bool | None:
        """Whether any of the optimizer's groups decays its weights; None where that is not known."""
        try:
            decays = [group["weight_decay"] for group in self.info["optimizer"]["groups"]]
        except (KeyError, TypeError):
            return None
        return any(isinstance(decay, int | float) and decay > 0 for decay in decays)

    def trajectory(self) -> "Trajectory":
        """What the last analysis of the run found, or has found so far: some snapshots may still be `unsampled`.

        Raises:
            RunError: there is none, or it is of another recording than the one that is there now.
        """
        from groktrace.analysis.results.store import latest_trajectory  # built on this package: only where it is called

        return latest_trajectory(self)

    def draws(self, step: int) -> "Draws":
        """What the chains drew at one snapshot, where the last analysis was asked to keep it.

        Args:
            step: of the snapshot.

        Raises:
            RunError: it was not, or the file is damaged.
        """
        from groktrace.analysis.results.draws import load_draws

        return load_draws(self, step)

    def refreshed(self) -> "Run":
        """The run as it is now.

        Raises:
            RunError: as `open_run`.
        """
        pending.flush(self.name)
        try:
            if self.remote is not None:
                self.remote.refresh()
            return _read_run(self.root, self.name, self.remote)
        except OSError as failure:
            raise RunError(f"{self.name}: cannot be read ({failure.strerror or failure}).") from failure

    def publish(self, path: Path) -> None:
        """Send a file in `root` to where the run lies.

        Raises:
            RunError: it cannot be sent.
        """
        if self.remote is not None:
            try:
                self.remote.send(path)
            except OSError as failure:
                raise RunError(f"{self.name}: results cannot be sent ({failure}).") from failure

    def publish_folder(self, folder: Path, ending: str) -> None:
        """Send the files of a folder in `root`, in place of those with that ending that lie there.

        Raises:
            RunError: they cannot be sent.
        """
        if self.remote is not None:
            try:
                self.remote.send_folder(folder, ending)
            except OSError as failure:
                raise RunError(f"{self.name}: results cannot be sent ({failure}).") from failure

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Send, where the run is remote, what is written within that belongs neither to recording nor analysis.

        Raises:
            RunError: it cannot be sent.
        """
        before = self._others()
        yield
        if self.remote is None:
            return
        logs, changed = self.root / layout.TENSORBOARD_FOLDER, self._others().items() - before.items()
        for path in sorted(path for path, _ in changed if logs not in path.parents):
            self.publish(path)
        if any(logs in path.parents for path, _ in changed):
            self.publish_folder(logs, layout.EVENTS_SUFFIX)

    def _others(self) -> dict[Path, tuple[int, int]]:
        """Time and size of the files in `root` that belong neither to recording nor analysis, if it is remote."""
        own = (layout.WEIGHTS_FOLDER, layout.ANALYSIS_FOLDER, *layout.START_FILES)
        found = () if self.remote is None else (path for path in self.root.iterdir() if path.name not in own)
        paths = (path for folder in found for path in (folder, *folder.rglob("*")) if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

    @cached_property
    def data(self) -> RecordedData | None:
        """The samples that the recording kept; None where it kept none.

        Raises:
            RunError: the file that holds them is damaged.
        """
        path, entry = self.root / layout.DATA_FILE, self.info["data"]
        if not path.exists():
            return None
        tensors, _ = read_tensors(path)
        if entry is None:
            raise RunError(f"{self.root / layout.RUN_FILE}: names no data, but {layout.DATA_FILE} is there.")
        train = _read_batch(entry["train"], "train", tensors, path)
        val = _read_batch(entry["val"], "val", tensors, path) if entry.get("val") is not None else None
        if len(train) > self.info["n"]:
            raise RunError(
                f"{self.root / layout.RUN_FILE}: damaged: n is {self.info['n']}, but {layout.DATA_FILE} holds "
                f"{len(train)} training samples."
            )
        constants = {key[len("constant.") :]: value for key, value in tensors.items() if key.startswith("constant.")}
        return RecordedData(train, val, self.info["n"], constants)

    @cached_property
    def task(self) -> Task:
        """Loss and data as recorded.

        Raises:
            TaskError: the recording could not keep them; the message says what to pass.
            RunError: the files that hold them are damaged.
        """
        from groktrace.run.program import Program

        hint = self.info.get("task") or "package.module:factory"
        program_path = self.root / layout.PROGRAM_FILE
        data = self.data if program_path.exists() else None
        if data is None:
            missing = "" if (self.root / layout.DATA_FILE).exists() else ", train=..."
            raise TaskError(
                f"{self.root}: the recording holds no model and loss to evaluate; pass --task {hint}, "
                f"a function that returns groktrace.Task.from_model(model, loss=...{missing})."
            )
        document = read_json(program_path)
        if not isinstance(document, dict) or not isinstance(document.get(SHIFT_INVARIANT_KEY), bool):
            raise RunError(f"{program_path}: not a groktrace program.")
        program = Program.from_json(document, data.constants, where=str(program_path))
        if unknown := [name for name in program.weights if name not in self.specs]:
            raise RunError(f"{program_path}: uses the weight '{unknown[0]}', which {layout.RUN_FILE} does not list.")
        return Task(program.forward, data.train, data.val, data.n, document[SHIFT_INVARIANT_KEY])


def _read_batch(entry: Any, name: str, tensors: dict[str, Tensor], path: Path) -> Batch:
    """One of the recorded sets of samples."""
    prefix = f"{name}."
    try:
        keys = sorted((key for key in tensors if key.startswith(prefix)), key=lambda key: int(key[len(prefix) :]))
        leaves = tuple(tensors[key] for key in keys)
        check_lengths(leaves, name)
        unflatten(entry["structure"], leaves)
    except (TaskError, KeyError, TypeError, ValueError, RecursionError) as failure:
        raise RunError(
            f"{path}: the recorded {name} data are damaged ({failure}), or {layout.RUN_FILE} describes others."
        ) from failure
    return Batch(leaves, entry["structure"])


def open_run(path: str | Path) -> Run:
    """Open a run directory.

    Args:
        path: the directory that `groktrace.watch(out=...)` wrote, or its URL.

    Raises:
        RunError: it is missing, not groktrace's, of a newer format, damaged, or without snapshots.
    """
    remote = None
    pending.flush(path)
    try:
        if is_url(path):
            remote = Remote(str(path))
            remote.fetch_results()
        return _read_run(Path(path) if remote is None else remote.folder, str(path), remote)
    except OSError as failure:
        raise RunError(f"{path}: cannot be read ({failure.strerror or failure}).") from failure


def _read_run(root: Path, name: str, remote: Remote | None) -> Run:
    refuse_checkpoints(root, name)
    if not root.is_dir():
        raise RunError(f"{root}: no such directory; expected one that groktrace.watch(out=...) wrote.")
    if not (root / layout.RUN_FILE).exists():
        raise RunError(f"{name}: {NO_RUN}")
    if (link := next(layout.links_out(root), None)) is not None:
        raise RunError(f"{link}: a link {LINK_ADVICE}")
    check_format(read_unverified(root / layout.RUN_FILE), root / layout.RUN_FILE)
    # Before the snapshots are listed, so that none is missed that came before the recording said that it is closed.
    info = read_json(root / layout.RUN_FILE)
    specs = check_info(info, root / layout.RUN_FILE)
    steps = layout.snapshot_steps(root)
    if not steps:
        raise RunError(f"{name}: holds no snapshots; the training has not kept one yet, or they were removed.")

    @cache
    def frozen() -> dict[str, Tensor]:
        path = root / layout.FROZEN_FILE
        return read_tensors(path)[0] if path.exists() else {}

    snapshots = tuple(Snapshot(s, layout.snapshot_path(root, s), specs, frozen, remote) for s in steps)
    return Run(root, info, specs, snapshots, remote)


def _describe(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
