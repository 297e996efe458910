"""Launching a kernel at a fraction of Triton's own host time.

Triton binds the arguments by name and makes a key of their specialisation at every call: 20 to 60 us of host time for
the argument lists here. This makes an equivalent key from the few facts that Triton specialises on, and keeps the
compiled kernel by it; the first call with a key goes through Triton, its disk cache included.
"""

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,  # its parameters are, in this order: the tensors, the integers, the constants
    programs: int,
    tensors: tuple[Tensor | None, ...],  # the first is on the device to run on
    integers: tuple[int, ...],
    constants: dict[str, Any],
    **options: Any,  # the compiler's, num_warps and so on
) -> None:
    """Run `programs` programs of the kernel on the tensors' device."""
    # Triton 3.9 warns that the default is about to change.
    options |= {"enable_fp_fusion": True}
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[(programs,)](*tensors, *integers, **constants, **options)
        return
    device = tensors[0].device.index  # type: ignore[union-attr]  # the first is never None
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, tensors, integers, constants, **options)
        return
    key = (
        kernel,
        device,
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
        *[(n % 16 == 0, n == 1, n >> 31 != 0) for n in integers],
        *constants.values(),
        *options.values(),
    )
    compiled = _compiled.get(key)
    if compiled is None or torch.version.hip:  # AMD's backend specialises on tensors' sizes, too
        _compiled[key] = kernel[(programs,)](*tensors, *integers, **constants, **options)
    else:
        compiled[programs, 1, 1](*tensors, *integers, *constants.values())
