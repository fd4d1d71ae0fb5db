"""What a card would be asked to launch: Triton kernels, which the interpreter runs here, and operations of torch that compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Torch(TorchDispatchMode):
    """Writes down what makes or changes values; views of a tensor and memory without contents launch nothing."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log
        self.silent = False

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self.silent and self._computes(func, args, made):
            self.log.append(f"torch.{func._schema.name.partition('::')[2]}")
        return made

    def _computes(self, func: Any, args: Sequence[Any], made: Any) -> bool:
        if func._schema.is_mutable:
            return any(isinstance(leaf, Tensor) and leaf.numel() for leaf in tree_leaves(args))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        fresh = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.numel()
                 and leaf.untyped_storage().data_ptr() not in known]
        return bool(fresh) and "empty" not in func._schema.name


@contextmanager
def launches() -> Iterator[list[str]]:
    """A list that grows while this lasts: "attention._attend" for a Triton kernel, "torch.add" for torch. Memory must not be
    poisoned meanwhile, or its filling is counted."""
    log: list[str] = []

    def tell(kernel: Any, again: Callable[[], None]) -> None:
        log.append(f"{kernel.__module__.split('.')[-2]}.{kernel.__name__}")

    with torch.inference_mode(), interpreted_launches(_Torch(log), tell):
        yield log


class Silenced(Protocol):
    """A dispatch mode that passes over what it sees while it is silent."""

    silent: bool

    def __enter__(self) -> Any: ...

    def __exit__(self, *failure: Any) -> Any: ...


@contextmanager
def interpreted_launches(mode: Silenced, tell: Callable[[Any, Callable[[], None]], None], *,
                         computes: bool = True) -> Iterator[None]:
    """While this lasts, `mode` sees torch's operations but not those by which Triton's interpreter computes; of each launch of a
    kernel `tell` is told the kernel, and what launches it again. computes: whether it is launched now, too."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def told(executor: Any, *given: Any, **options: Any) -> None:
        tell(executor.fn, lambda: run(executor, *given, **options))
        if not computes:
            return
        mode.silent, before = True, mode.silent
        try:
            run(executor, *given, **options)
        finally:
            mode.silent = before

    GridExecutor.__call__ = told
    try:
        with mode:
            yield
    finally:
        GridExecutor.__call__ = run
