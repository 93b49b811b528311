"""The tensors of a live network, by the names that a recording gives them."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from groktrace.errors import TaskError
from groktrace.run.views import repeats

_MAX_NAMES = 5  # in one message, of each kind


def plain_model(model: nn.Module) -> nn.Module:
    """Unwrap torch.compile and data-parallel wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a plain model, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Set a network's tensors in place: all of them, or none where they do not fit.

    Args:
        model: the network; wrappers are seen through.
        tensors: by name, tied ones once, non-persistent buffers among them.
        source: where they come from, for messages.

    Raises:
        TaskError: the network has other tensors.
    """
    if not isinstance(model, nn.Module):
        raise TaskError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    own = dict(named_tensors(plain_model(model)))
    unfit = (_misfit(name, own[name], tensors[name]) for name in own if name in tensors)
    faults = [
        *listed("the model lacks ", (f"'{name}'" for name in tensors if name not in own)),
        *listed("the snapshot lacks ", (f"'{name}'" for name in own if name not in tensors)),
        *listed("", filter(None, unfit)),
    ]
    if faults:
        raise TaskError(
            f"{source}: does not fit the model: {'; '.join(faults)}. Expected the network that was recorded; the model "
            "was left as it was."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if not repeats(tensor):  # these hold the values already
                tensor.copy_(tensors[name])


def _misfit(name: str, own: Tensor, given: Tensor) -> str | None:
    """Why a tensor of the network cannot take a value; None where it can."""
    if nn.parameter.is_lazy(own):
        return f"'{name}' has no shape yet (run the model on one batch first)"
    if hasattr(own, "full_tensor"):
        return f"'{name}' lies in shards (load into the model before it is sharded)"
    if own.is_meta or own.layout != torch.strided:
        return f"'{name}' is on 'meta' or sparse (build the model with dense weights on a device)"
    if own.shape != given.shape:
        return f"'{name}' is {list(own.shape)} in the model, {list(given.shape)} in the snapshot"
    if not torch.can_cast(given.dtype, own.dtype):
        return f"'{name}' is {own.dtype} in the model, {given.dtype} in the snapshot"
    if repeats(own) and not torch.equal(own.cpu(), given.to(own.dtype)):
        return f"'{name}' is expanded, so that its elements cannot be set one by one"
    return None


def listed(what: str, names: Iterable[str]) -> list[str]:
    """The first few as one text, after what is said of them; nothing where there are none."""
    found = list(names)
    more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
    return [what + ", ".join(found[:_MAX_NAMES]) + more] if found else []
