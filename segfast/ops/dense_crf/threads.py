"""Several images at once, each on threads of its own: no thread waits for another within an operation."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Each image needs memory of its own while it is computed.
_MOST_AT_ONCE = 8


def each_image(compute: Callable[[int], Tensor], images: int) -> list[Tensor]:
    """`[compute(0), ..., compute(images - 1)]` of work on a CPU that autograd and tracers need not see.

    PyTorch's threads are divided between the images meanwhile, for the whole process.
    """
    threads = torch.get_num_threads()
    at_once = min(images, threads, _MOST_AT_ONCE)
    if at_once < 2:
        return [compute(i) for i in range(images)]
    inference = torch.is_inference_mode_enabled()

    def alone(i: int) -> Tensor:
        with torch.inference_mode(inference), torch.no_grad():
            return compute(i)

    torch.set_num_threads(threads // at_once)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(alone, range(images)))
    finally:
        torch.set_num_threads(threads)
