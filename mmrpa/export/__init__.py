"""Export of models to ONNX and torch.export, checked before it is done.

Needs mmengine and, for ONNX, the packages onnx, onnxscript and onnxruntime.
"""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .check import CHECK_SIZES, CheckError, check_program
from .formats import FORMATS, ExportError, export_model
from .model import OUTPUTS, PARTS, ExportModel
from .pooling import AdaptiveAvgPool, replace_pooling

__all__ = [
    'CHECK_SIZES', 'FORMATS', 'OUTPUTS', 'PARTS', 'AdaptiveAvgPool',
    'CheckError', 'ExportError', 'ExportModel', 'check_program',
    'export_model', 'replace_pooling'
]
