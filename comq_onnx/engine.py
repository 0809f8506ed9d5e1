"""Run tasks: pure functions of values, here one after the other; `workers` runs the same tasks on other processes.

What runs tasks decides neither which tasks there are nor the order of sums, so the result is the same to the byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# so many values are added from left to right; sums of more are sums of such sums
ARITY = 8


class Embedded:
    """Run each task in this process, when it is submitted; a value stands for itself."""

    # whether the values of tasks are here
    is_here = True

    def submit(self, function: Callable[..., Any], *given: Any) -> Any:
        """Return the value of function(*given), or what stands for it; given: values, or what stands for them."""
        return function(*given)

    def place(self, value: Any, _where: int) -> Any:
        """Return what stands for a value of the caller; values of one number lie at one place where they can."""
        return value

    def reduce(self, add: Callable[[Any, Any], Any], parts: Iterable[Any]) -> Any:
        """Return the sum of values, added from left to right; add: may change its first value and return it."""
        return functools.reduce(add, parts)

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """Return the values that the given ones stand for. Raises the first error of their tasks, in this order."""
        return list(values)


def fold(engine: Embedded, add: Callable[[Any, Any], Any], parts: Iterator[Any], count: int) -> Any:
    """Return the sum of `count` values in an order that depends on their number alone: a tree, ARITY at each node.

    Of the values that are made when `parts` yields them, few exist at once.
    """
    if count == 1:
        return next(parts)
    width = 1
    while width * ARITY < count:
        width *= ARITY
    return engine.reduce(add, (fold(engine, add, parts, min(width, count - i)) for i in range(0, count, width)))
