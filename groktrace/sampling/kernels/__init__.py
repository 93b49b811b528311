"""The samplers, one file each, and how they are named."""

from groktrace.errors import SettingsError
from groktrace.sampling.kernels.baoab import BAOAB
from groktrace.sampling.kernels.base import Kernel
from groktrace.sampling.kernels.leimkuhler_matthews import LeimkuhlerMatthews
from groktrace.sampling.kernels.sgld import SGLD

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (BAOAB(), LeimkuhlerMatthews(), SGLD())}


def find_kernel(method: str | Kernel) -> Kernel:
    """The kernel of a name; a kernel as it is.

    Raises:
        SettingsError: there is none of that name.
    """
    if isinstance(method, Kernel):
        return method
    if method not in KERNELS:
        raise SettingsError(f"method: expected one of {', '.join(KERNELS)}, or a kernel, got {method!r}.")
    return KERNELS[method]
