"""The tables of configs/*/README.md."""

import shutil

import pytest
from helpers import TOOLS, load_tool

READMES = sorted((TOOLS.parent / 'configs').glob('*/README.md'))


def rows(path):
    tool = load_tool('update_config_tables')
    return [line for line in path.read_text().splitlines()
            if tool.ROW.match(line)]


@pytest.mark.parametrize('readme', READMES, ids=lambda p: p.parent.name)
def test_counts_are_those_that_the_tool_writes(readme, tmp_path, capsys):
    """Two rows a host are counted anew; all rows must be filled."""
    tool = load_tool('update_config_tables')
    lines = rows(readme)
    assert lines and not any('| - |' in line for line in lines)
    for line in (lines[0], lines[-1]):
        assert tool.fill_row(line, readme.parent) == line
    copy = tmp_path / 'README.md'
    shutil.copy(readme, copy)
    copy.write_text('no table here\n| a | b |\n')
    assert tool.main([str(copy)]) == 0
    assert copy.read_text() == 'no table here\n| a | b |\n'


def test_a_missing_file_is_named(tmp_path, capsys):
    tool = load_tool('update_config_tables')
    assert tool.main([str(tmp_path / 'no.md')]) == 2
    assert 'no.md' in capsys.readouterr().err
