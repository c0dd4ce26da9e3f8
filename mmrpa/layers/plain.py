"""Which layers may be computed without being called."""

from typing import Type

from torch import nn


def is_plain(module: nn.Module, kind: Type[nn.Module]) -> bool:
    """Whether a module is just its parameters: of exactly this kind, no hooks.

    Hooks, subclasses, parametrizations, adapters and quantised replacements
    want to be called, so nothing may compute past them.
    """
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks)
