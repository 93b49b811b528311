"""Attention by fused kernels wherever these can do what is asked of them."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_thread = threading.local()


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Keep attention unfused in this thread, for losses that are differentiated twice."""
    before = getattr(_thread, "unfused", False)
    _thread.unfused = True
    try:
        yield
    finally:
        _thread.unfused = before


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, unfused where the fused kernels fail."""
    if _unfused():
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        # By name: a backend is chosen for the whole process, and other threads may want another.
        math = torch.ops.aten._scaled_dot_product_attention_math.default
        arguments = (query, key, value, attn_mask, dropout_p, is_causal, None)
        return math(*arguments, scale=scale, enable_gqa=enable_gqa)[0]
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    return torch.ops.aten.scaled_dot_product_attention.default(*arguments, scale=scale, enable_gqa=enable_gqa)


def for_live_models() -> contextlib.AbstractContextManager[None]:
    """The same for a model that calls PyTorch's own function."""
    return sdpa_kernel(SDPBackend.MATH) if _unfused() else contextlib.nullcontext()


def _unfused() -> bool:
    # The fused kernels can be neither stacked nor differentiated twice.
    return getattr(_thread, "unfused", False) or torch._C._functorch.peek_interpreter_stack() is not None
