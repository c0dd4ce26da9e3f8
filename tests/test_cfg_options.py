"""--cfg-options: the values of mmengine, and errors of usage."""

import argparse

import pytest

from mmrpa.cfg_options import DictAction


def parse(*argv):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(['--cfg-options', *argv]).cfg_options


def test_values():
    assert parse('a.b=1', 'c=[(1,2),x]', 'd=e=f', 'g=') == {
        'a.b': 1, 'c': [(1, 2), 'x'], 'd': 'e=f', 'g': ''}


@pytest.mark.parametrize(('argv', 'message'), [
    (['', ], "takes KEY=VALUE, got ''"),
    (['a=1', 'b'], "takes KEY=VALUE, got 'b'"),
    (['=1'], "takes KEY=VALUE, got '=1'"),
    (['a..b=1'], "takes KEY=VALUE, got 'a..b=1'"),
    (['a=1,(2'], "can not read 'a=1,(2'"),
])
def test_refusals(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert f'error: argument --cfg-options: {message}' in (
        capsys.readouterr().err)
