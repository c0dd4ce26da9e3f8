"""Which layers may be computed without being called, and when."""

from typing import Type

import torch
from torch import nn


def is_plain(module: nn.Module, kind: Type[nn.Module]) -> bool:
    """Whether a module is just its parameters: of exactly this kind, no hooks.

    Hooks, subclasses, parametrizations, adapters and quantised replacements
    want to be called, so nothing may compute past them.
    """
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks)


def is_exporting() -> bool:
    """Whether torch.export (or the ONNX exporter, which uses it) traces.

    Sizes are symbols then: the graph has to hold for all of them, so nothing
    may depend on one.
    """
    # Came with torch 2.7; before it, is_compiling() says so as well.
    asked = getattr(torch.compiler, 'is_exporting', None)
    return (asked or torch.compiler.is_compiling)()
