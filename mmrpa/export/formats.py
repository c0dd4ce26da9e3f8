"""Writing a model as an ONNX file or a torch.export program."""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
)

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.export import Dim, ExportedProgram

from .. import __version__, torch_release
from ..whole_files import whole_file
from .check import (
    CHECK_SIZES,
    Checked,
    CheckError,
    Size,
    check_program,
)
from .model import ExportModel

FORMATS = ('onnx', 'torch-export')
SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2'}
OPSETS = (18, 23)
META_FILE = 'mmrpa.json'
# Traced with two images of a size that no stage of a backbone makes 1 or
# square, so that the tracer takes no two axes for one.
_TRACED = (2, 72, 104)
_AXES = ({0: 'batch', 2: 'height', 3: 'width'}, )
# Before, no graph held for sides and batches of 1: no backed_size_oblivious.
_OLDEST_TORCH = (2, 7)
_ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')


class ExportError(RuntimeError):
    """A model that cannot be exported, or a package that is missing."""


def export_model(model: ExportModel, path: Union[str, Path], *,
                 file_format: str = 'onnx', opset: int = 18,
                 sizes: Sequence[Size] = CHECK_SIZES,
                 about: Optional[Dict[str, Any]] = None) -> List[Checked]:
    """Export a model and check the file; nothing is left if that fails.

    Args:
        model (ExportModel): The model.
        path (str | Path): The file to write; its folder must exist.
        file_format (str): ``'onnx'`` or ``'torch-export'``.
        opset (int): Of ONNX, 18 to 23.
        sizes (sequence): (batch, height, width) to check.
        about (dict, optional): What else to write into the metadata.

    Returns:
        list[Checked]: What the check found.

    Raises:
        CheckError: The file computes something else.
        ExportError: torch cannot export the model, or is too old, or packages
            are missing.
        OSError: The file cannot be written.
        ValueError: An argument does not fit.
    """
    path = Path(path)
    check_arguments(path, file_format, opset, sizes, model.smallest_side)
    meta = dict(mmrpa_version=__version__, torch_version=torch.__version__,
                **(about or {}), **model.describe())
    write, load = ((_write_onnx, _load_onnx) if file_format == 'onnx' else
                   (_write_program, _load_program))
    with whole_file(path, path.suffix) as temporary, _quiet():
        program = _capture(model)
        write(program, model, temporary, meta, opset)
        checked = check_program(load(temporary), model, sizes)
    return checked


def check_arguments(path: Path, file_format: str, opset: int,
                    sizes: Sequence[Size], smallest: int = 1) -> None:
    """Find what is wrong before any work is done.

    Raises:
        ExportError: A package is missing, or torch is too old.
        ValueError: An argument does not fit.
    """
    if torch_release.release(torch.__version__) < _OLDEST_TORCH:
        oldest = '.'.join(map(str, _OLDEST_TORCH))
        raise ExportError(
            f'the export needs torch {oldest} or later, this is '
            f"{torch.__version__}: pip install --upgrade 'torch>={oldest}', "
            'then a torchvision and an mmcv built for it')
    if file_format not in FORMATS:
        raise ValueError(f'format must be one of {FORMATS}, got '
                         f'{file_format!r}')
    suffix = SUFFIXES[file_format]
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f'the output {str(path)!r} must be a file that ends '
                         f'in {suffix} for format {file_format!r}')
    if not path.parent.is_dir():
        raise ValueError(f'the folder of the output {str(path)!r} does not '
                         'exist; make it first')
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f'opset must be {OPSETS[0]} to {OPSETS[1]}, got '
                         f'{opset}')
    for size in sizes:
        if min(size) < 1 or min(size[1:]) < smallest:
            raise ValueError(
                f'cannot check at {"x".join(map(str, size))}: the batch must '
                'be at least 1, height and width at least the size of a '
                f'patch, {smallest}')
    if file_format == 'onnx':
        _need_onnx()


def _need_onnx() -> None:
    from importlib.util import find_spec
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(f'ONNX export needs {", ".join(missing)}: pip '
                          f'install {" ".join(missing)}')


# Capturing the graph.


def _capture(model: ExportModel) -> ExportedProgram:
    """The graph of a model for any batch, height and width."""
    batch, height, width = _TRACED
    image = torch.zeros(batch, model.input_channels, height, width)
    sizes = {dim: Dim.DYNAMIC for dim in _AXES[0]}
    # Oblivious: no case of its own for a side or a batch of 1.
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):
        try:
            program = torch.export.export(
                model.for_export(), (image, ), dynamic_shapes=(sizes, ),
                strict=False)
        except _EXPORT_ERRORS as error:
            raise ExportError(
                f'torch {torch.__version__} cannot export this model for all '
                f'sizes: {_first_line(error)}') from error
    return _for_all_sizes(program, model.smallest_side)


# torch.export raises what the model's code raises under symbols, as well.
_EXPORT_ERRORS = (AssertionError, AttributeError, IndexError, KeyError,
                  NotImplementedError, RuntimeError, TypeError, ValueError)


def _for_all_sizes(program: ExportedProgram, smallest: int) -> ExportedProgram:
    """The same graph without the lower bounds that tracing has noted.

    Tracing asks whether the batch is 1 and whether a map has one row, to
    choose a memory format, and notes the answers for its example as
    conditions. The graph does not depend on them; the check runs such sizes.
    """
    image = next(node for node in program.graph.nodes
                 if node.name in program.graph_signature.user_inputs)
    shape = image.meta['val'].shape
    bounds = dict(program.range_constraints)
    for dim, low in ((0, 1), (2, smallest), (3, smallest)):
        symbol = shape[dim].node.expr
        bounds[symbol] = type(bounds[symbol])(low, bounds[symbol].upper)
    result = ExportedProgram(
        root=program.graph_module, graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict, range_constraints=bounds,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs, constants=program.constants,
        verifiers=program.verifiers)
    # From torch 2.9 on they are kept as code, too, which a loaded program
    # runs; nothing public takes it out.
    if hasattr(result, '_guards_code'):
        result._guards_code = []
    return result


# The two formats: writing, and reading back to check.


def _write_onnx(program: ExportedProgram, model: ExportModel, path: Path,
                meta: Dict[str, Any], opset: int) -> None:
    count = len(program.graph_signature.user_outputs)
    try:
        exported = torch.onnx.export(
            program, (), dynamo=True, verbose=False, opset_version=opset,
            input_names=['image'], output_names=model.output_names(count),
            dynamic_shapes=_AXES)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f'the ONNX exporter of torch {torch.__version__} '
                          f'failed: {_first_line(error)}') from error
    # Lists and dicts as JSON, text as it is.
    exported.model.metadata_props.update({
        f'mmrpa.{key}': value if isinstance(value, str) else json.dumps(value)
        for key, value in meta.items()})
    exported.save(str(path), external_data=False)


def _load_onnx(path: Path) -> Callable[[Tensor], List[Tensor]]:
    import onnxruntime
    try:
        session = onnxruntime.InferenceSession(
            str(path), providers=['CPUExecutionProvider'])
    except _onnxruntime_errors() as error:
        raise CheckError(
            f'onnxruntime {onnxruntime.__version__} cannot load the file: '
            f'{_first_line(error)}') from error

    def run(image: Tensor) -> List[Tensor]:
        try:
            outputs = session.run(None, dict(image=image.numpy()))
        except _onnxruntime_errors() as error:
            raise _cannot_run('onnxruntime', image, error) from error
        return [torch.from_numpy(output) for output in outputs]

    return run


def _onnxruntime_errors() -> Tuple[Type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state
    return (state.Fail, state.InvalidArgument, state.InvalidGraph,
            state.InvalidProtobuf, state.NotImplemented,
            state.RuntimeException)


def _cannot_run(runtime: str, image: Tensor,
                error: Exception) -> CheckError:
    size = 'x'.join(map(str, image.shape))
    return CheckError(f'{runtime} cannot run the file on an image of {size}: '
                      f'{_first_line(error)}')


def _write_program(program: ExportedProgram, model: ExportModel, path: Path,
                   meta: Dict[str, Any], opset: int) -> None:
    # Into memory: on a full disk torch's own writer ends the process.
    content = io.BytesIO()
    torch.export.save(program, content,
                      extra_files={META_FILE: json.dumps(meta)})
    path.write_bytes(content.getbuffer())


def _load_program(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    program = torch.export.load(str(path)).module()

    def run(image: Tensor) -> Sequence[Tensor]:
        try:
            return program(image)
        except (AssertionError, RuntimeError) as error:
            raise _cannot_run('torch', image, error) from error

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say to those who develop them."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:300] if lines else type(error).__name__
