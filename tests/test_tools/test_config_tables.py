"""The tables of configs/*/README.md."""

import re

import pytest
from helpers import TOOLS, load_tool

READMES = sorted((TOOLS.parent / 'configs').glob('*/README.md'))


def rows(path):
    tool = load_tool('update_config_tables')
    return [line for line in path.read_text().splitlines()
            if tool.ROW.match(line)]


# A change of a backbone or of the counting shows in one host's table.
@pytest.mark.parametrize('readme', [
    pytest.param(path, id=path.parent.name, marks=[] if
                 path.parent.name == 'mmdet' else pytest.mark.long)
    for path in READMES])
def test_counts_are_those_that_the_tool_writes(readme, tmp_path, capsys):
    """Two rows a host are counted anew; all rows must be filled."""
    tool = load_tool('update_config_tables')
    lines = rows(readme)
    assert lines and not any('| - |' in line for line in lines)
    for line in (lines[0], lines[-1]):
        assert tool.fill_row(line, readme.parent) == line
    # A row whose cells are blank is filled; all other text stays.
    name, path = re.match(r'\| \[(.+)\]\((.+?)\)', lines[0]).groups()
    path = readme.parent / path
    copy = tmp_path / 'README.md'
    blank = f'text\n| [{name}]({path}) | - | - | - | x |\n| a | b |\n'
    copy.write_text(blank)
    assert tool.main([str(copy)]) == 0
    cells = lines[0].split('|')[2:5]
    assert copy.read_text() == blank.replace(' - | - | - ', '|'.join(cells))


def test_a_missing_file_is_named(tmp_path, capsys):
    tool = load_tool('update_config_tables')
    assert tool.main([str(tmp_path / 'no.md')]) == 2
    assert 'no.md' in capsys.readouterr().err
