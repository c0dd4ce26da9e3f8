"""Find in a module what could run code out of a file.

References count as much as calls: a function that is handed on, or gets
another name, is called elsewhere. Names are looked up in the imports of the
whole file, and in assignments of a module or function to a name.
"""

import ast
from collections import defaultdict

# Functions and classes that unpickle or run what they read, by their last
# name, with or without an underscore before it, and the modules of them.
READERS = {'load', 'loads', 'Unpickler', 'PackageImporter', 'open'}
MODULES = {'pickle', '_pickle', 'dill', 'joblib', 'cloudpickle', 'shelve',
           'marshal', 'yaml', 'torch', 'serialization', 'jit', 'hub',
           'export', 'package', 'mmengine', 'mmcv', 'fileio', 'io'}
# The same wherever they come from.
ANYWHERE = {'unsafe_load', 'full_load', 'load_url', 'load_state_dict_from_url',
            'read_pickle', 'get_state_dict', 'fromstring'}
# Builtins, and what os has beside them.
PROGRAMS = {'eval', 'exec', 'os.system', 'os.popen'}
# Loaders of hosts, and what builds their classes, which may read: only where
# the process or the block is protected.
HOST_FUNCTIONS = {
    'load_checkpoint', '_load_checkpoint', 'load_from_local', 'init_detector',
    'init_model', 'init_segmentor', 'get_model', 'from_cfg', 'init_weights',
    'run_path'}
# Their names are also those of options, types and arguments: calls only.
HOST_CALLS = {'Runner', 'FlexibleRunner', 'resume', 'DetInferencer',
              'MMSegInferencer', 'ImageClassificationInferencer'}
BUILDERS = {'MODELS', 'models', 'RUNNERS', 'DETECTORS'}
PROTECTIONS = {'protect_process', 'use_safe_reader'}  # from there on


def find_reads(source: str, is_tool: bool = False) -> list[tuple[int, str]]:
    """Lines and what is wrong in them.

    Args:
        source (str): Of a module.
        is_tool (bool): It is run by its ``main``: what ``main`` protects is
            protected in the functions of the file, too.
    """
    finder = _Finder(ast.parse(source), is_tool)
    return sorted(finder.found)


class _Finder(ast.NodeVisitor):

    def __init__(self, tree: ast.Module, is_tool: bool) -> None:
        self.found: list[tuple[int, str]] = []
        self.calls: dict[ast.expr, ast.Call] = {}
        self.names: dict[str, set[str]] = defaultdict(set)
        self.protected = False
        self.protects_all = is_tool and any(
            isinstance(node, ast.FunctionDef) and node.name == 'main'
            and any(map(_protects, node.body)) for node in tree.body)
        nodes = sorted((node for node in ast.walk(tree)
                        if hasattr(node, 'lineno')), key=lambda n: n.lineno)
        for node in nodes:
            self._remember(node)
        self.visit(tree)

    def _remember(self, node: ast.AST) -> None:
        """Other names of modules and functions."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition('.')[0]
                self.names[alias.asname or first].add(
                    alias.name if alias.asname else first)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                self.names[alias.asname or alias.name].add(
                    f'{node.module}.{alias.name}')
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.names[target.id] |= {
                        name for name in self._resolve(node.value)
                        if name.split('.')[-1] in MODULES | BUILDERS}

    def _resolve(self, node: ast.AST) -> set[str]:
        """The dotted names that an expression may stand for."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id) or {node.id}
        if isinstance(node, ast.Attribute):
            return {f'{owner}.{node.attr}'
                    for owner in self._resolve(node.value) or {''}}
        if isinstance(node, ast.Call) and node.args and all(
                isinstance(part, ast.Constant) for part in node.args[1:]):
            function = ast.unparse(node.func).split('.')[-1]
            text = getattr(node.args[-1], 'value', None)
            if function in ('import_module', '__import__'):
                return {str(text)}
            if function == 'getattr' and len(node.args) > 1:
                return {f'{owner}.{node.args[1].value}'
                        for owner in self._resolve(node.args[0])}
        return set()

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                self._check(node, {f'{node.module}.{alias.name}'})

    visit_ImportFrom = visit_Import

    def visit_Call(self, node: ast.Call) -> None:
        self.calls[node.func] = node
        options = {key.arg: ast.unparse(key.value) for key in node.keywords}
        names = self._resolve(node.func)
        for option in ('allow_pickle', 'shell'):
            if options.get(option, 'False') != 'False':
                self.found.append((node.lineno, f'{option}='))
        if names & {'np.load', 'numpy.load'} and len(node.args) > 2:
            self.found.append((node.lineno, 'allow_pickle='))
        if names == {'torch.load'} and options.get('weights_only') == 'True':
            for part in (*node.args, *node.keywords):
                self.visit(part)
            return
        self._check(node, self._resolve(node))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name | ast.Attribute) -> None:
        # The code of a function, which is compared, reads nothing.
        if isinstance(node, ast.Attribute) and node.attr == '__code__':
            return
        self._check(node, self._resolve(node))
        self.generic_visit(node)

    visit_Attribute = visit_Name

    def _check(self, node: ast.AST, names: set[str]) -> None:
        if isinstance(getattr(node, 'ctx', None), ast.Store):
            return
        for name in sorted(names):
            *owner, last = name.split('.')
            of = owner[-1] if owner else ''
            if (last.lstrip('_') in READERS and of in MODULES
                    or last in ANYWHERE or last == '*' and of in MODULES
                    or name.removeprefix('builtins.') in PROGRAMS):
                self.found.append((node.lineno, name))
            built = last == 'build' and of in BUILDERS
            host = last in HOST_FUNCTIONS or (
                last in HOST_CALLS and node in self.calls)
            if (built or host) and not self.protected and not isinstance(
                    node, ast.ImportFrom):
                self.found.append((
                    node.lineno, f'unprotected {of}.build' if built else
                    f'unprotected {last}'))

    # Where a protection holds.

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item)
        before = self.protected
        self.protected |= any(_calls(item.context_expr, {'safe_reader'})
                              for item in node.items)
        for statement in node.body:
            self.visit(statement)
        self.protected = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self.protected
        for part in (*node.decorator_list, node.args):
            self.visit(part)
        self.protected = self.protects_all and node.name != 'main'
        for statement in node.body:
            self.visit(statement)
            self.protected |= _protects(statement)
        self.protected = before

    visit_AsyncFunctionDef = visit_FunctionDef


def _calls(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and (
        ast.unparse(node.func).split('.')[-1] in names)


def _protects(statement: ast.stmt) -> bool:
    """Whether all behind a statement of a function is protected."""
    return isinstance(statement, ast.Expr) and _calls(
        statement.value, PROTECTIONS)
