"""Work that is split into numbered pieces, done by several processes, taken in order."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")


def in_order(make: Callable[[int], Result], workers: int) -> Generator[Result, None, None]:
    """`make(0)`, `make(1)`, ... without end, the next few of them under way in other processes.

    Args:
      make: picklable unless `workers` is 1.
      workers: number of processes; they are spawned, so a script that passes more than 1 needs the
        usual `if __name__ == "__main__":`.

    Raises:
      ValueError: `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if workers == 1:
        number = 0
        while True:
            yield make(number)
            number += 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending: deque[Future[Result]] = deque(pool.submit(make, i) for i in range(2 * workers))
        number = len(pending)
        try:
            while True:
                yield pending.popleft().result()
                pending.append(pool.submit(make, number))
                number += 1
        finally:
            for future in pending:
                future.cancel()
