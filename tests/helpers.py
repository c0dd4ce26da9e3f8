"""Helpers that tests of several folders share."""
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent / 'tools'


def mmdet_models() -> ModuleType:
    """``mmdet.models``; skips the test if mmcv has no compiled operators.

    mmdet cannot be imported without; mmpretrain and mmseg can.
    """
    pytest.importorskip('mmcv.ops')
    import mmdet.models
    return mmdet.models


def load_tool(name: str) -> ModuleType:
    """Load ``tools/<name>.py`` as a module.

    ``tools`` is a folder of scripts, not a package. Each call executes the
    file anew, so that a test may change a tool's globals.

    Args:
        name (str): File name without ``.py``.

    Returns:
        ModuleType: The module, known to ``sys.modules`` as
        ``mmrpa_tool_<name>`` because ``test`` and the like are names of the
        standard library.

    Raises:
        FileNotFoundError: If there is no such tool.
    """
    path = TOOLS / f'{name}.py'
    if not path.is_file():
        known = sorted(p.stem for p in TOOLS.glob('*.py'))
        raise FileNotFoundError(f'no tool {name!r}; tools are {known}')
    # A script sees its neighbours because Python puts its folder first on
    # sys.path. Last is right here: tools/test.py must not hide the standard
    # library's test package from anybody.
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    spec = importlib.util.spec_from_file_location(f'mmrpa_tool_{name}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
