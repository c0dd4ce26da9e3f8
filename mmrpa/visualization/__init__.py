"""What representatives stand for, and what a query reads through them."""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .colors import representative_colors
from .painting import paint_routing
from .recording import (
    LayerInput,
    effective_representatives,
    record_inputs,
    record_routing,
)
from .responses import query_response

__all__ = [
    'LayerInput', 'effective_representatives', 'paint_routing',
    'query_response', 'record_inputs', 'record_routing',
    'representative_colors'
]
