"""Find the tensors of a network in a checkpoint, whatever their names there begin with."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from groktrace.importing.contents import CheckpointError, Contents, StoredTensor
from groktrace.run.info import WeightSpec
from groktrace.run.live_model import listed

# What wrappers put into names: torch.compile, FSDP, activation checkpoints; and, with less certainty, data parallelism.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_TRIES = (frozenset[str](), frozenset(_WRAPPERS), frozenset((*_WRAPPERS, "module")))


@dataclass(frozen=True)
class Wanted:
    """The tensors that a network needs.

    Attributes:
        specs: by name.
        aliases: further names of tied ones, with the name that is kept.
        optional: those that no checkpoint need hold.
        known: names of the network's state dict, some of which may be no tensors of a snapshot.
        ignored: patterns of names that the network gives no place to on purpose.
    """

    specs: Mapping[str, WeightSpec]
    aliases: Mapping[str, str]
    optional: frozenset[str]
    known: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Match:
    """The tensors of a network in a checkpoint.

    Attributes:
        tensors: for each of the network's names what the checkpoint holds of it; several where tied ones are apart.
        prefix: what the names begin with there, with its last dot.
        beside: how many tensors of the same dict are left out.
        exact: whether names and dtypes are the network's own.
    """

    tensors: Mapping[str, tuple[StoredTensor, ...]]
    prefix: str
    beside: int
    exact: bool


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Tensors that have the network's names after one prefix."""

    prefix: str
    tensors: dict[str, list[StoredTensor]]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    beside: int
    exact: bool

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)


def match_names(contents: Contents, wanted: Wanted, key: str | None, where: str) -> Match:
    """Find the network's tensors.

    Args:
        contents: of the checkpoint.
        wanted: the network's tensors.
        key: the dotted path under which they are; None where that is to be found.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: they are not there, or in several places.
    """
    tensors = contents.tensors
    if key is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
    best: list[_Candidate] = []
    for wrappers in _TRIES:
        found = list(_candidates(tensors, wanted, wrappers))
        fitting = [match for match in found if not match.faults]
        # One that is the whole of its dict comes before parts of it.
        fitting = [match for match in fitting if not match.beside] or fitting
        if len(fitting) > 1:
            places = " and ".join(f"'{match.prefix.rstrip('.')}'" for match in fitting[:5])
            raise CheckpointError(f"{where}: has weights of the model under {places}; say by --key which to take.")
        if fitting:
            tensors_found = {name: tuple(parts) for name, parts in fitting[0].tensors.items()}
            return Match(tensors_found, fitting[0].prefix, fitting[0].beside, fitting[0].exact)
        best += found
    raise _no_match(min(best, key=lambda match: match.faults, default=None), contents.tensors, wanted, key, where)


def _candidates(tensors: Mapping[str, StoredTensor], wanted: Wanted, wrappers: frozenset[str]) -> Iterable[_Candidate]:
    """What there is of the network after each prefix after which there is something."""
    kept = {_stripped(name, wrappers): name for name in wanted.specs}
    kept |= {_stripped(name, wrappers): first for name, first in wanted.aliases.items()}
    plain = {name: _stripped(name, wrappers) for name in tensors}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, text in plain.items():
        parts = text.split(".")
        for i in range(len(parts)):
            if (first := kept.get(".".join(parts[i:]))) is not None:
                found["".join(f"{part}." for part in parts[:i])][first].append(name)
    for prefix, names in found.items():
        held = {first: [tensors[name] for name in parts] for first, parts in names.items()}
        container = next(iter(held.values()))[0].container
        around = [name for name, tensor in tensors.items() if tensor.container == container]
        used = {name for parts in names.values() for name in parts}
        others = [plain[name] for name in around if name not in used]
        after = [name.removeprefix(prefix) for name in others if name.startswith(prefix)]
        unexpected = [name for name in after if name not in wanted.known]
        unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in wanted.ignored)]
        misshapen = [fault for first, parts in held.items() if (fault := _misfit(first, wanted.specs[first], parts))]
        own = all(parts == [prefix + first] for first, parts in names.items())
        yield _Candidate(
            prefix,
            held,
            [name for name in wanted.specs if name not in held and name not in wanted.optional],
            unexpected,
            misshapen,
            len(others),
            own and not prefix and not others and _same_dtypes(held, wanted.specs),
        )


def _stripped(name: str, wrappers: frozenset[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers) if wrappers else name


def _same_dtypes(held: Mapping[str, list[StoredTensor]], specs: Mapping[str, WeightSpec]) -> bool:
    return all(tensor.dtype == specs[name].dtype for name, parts in held.items() for tensor in parts)


def _misfit(name: str, spec: WeightSpec, held: list[StoredTensor]) -> str | None:
    """Why tensors of a checkpoint cannot be those of the network; None where they can."""
    for tensor in held:
        if tensor.shape != spec.shape or not torch.can_cast(tensor.dtype, spec.dtype):
            dtypes = [str(dtype).removeprefix("torch.") for dtype in (spec.dtype, tensor.dtype)]
            return (
                f"'{name}' is {dtypes[0]}{list(spec.shape)} in the model, {dtypes[1]}{list(tensor.shape)} in the "
                "checkpoint"
            )
    return None


def _no_match(
    best: _Candidate | None, tensors: Mapping[str, StoredTensor], wanted: Wanted, key: str | None, where: str
) -> CheckpointError:
    under = "" if key is None else f" under '{key}'"
    if best is None or not best.tensors:
        there = "; ".join(listed("it holds ", (f"'{name}'" for name in tensors))) or "it holds no tensors"
        needed = "; ".join(listed("the model has ", (f"'{name}'" for name in wanted.specs)))
        return CheckpointError(
            f"{where}: expected the weights of the model that the task makes{under}; {there}, {needed}. Have the task "
            "make the network that was trained, or name by --key where its weights are."
        )
    faults = [
        *listed("it lacks ", (f"'{name}'" for name in best.missing)),
        *listed("the model lacks ", (f"'{name}'" for name in best.unexpected)),
        *listed("", best.misshapen),
    ]
    after = f" (names after '{best.prefix}')" if best.prefix else ""
    return CheckpointError(
        f"{where}: does not fit the model{after}: {'; '.join(faults)}. Have the task make the network that was trained."
    )
