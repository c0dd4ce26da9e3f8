"""The helper that runs the guides: a wrong command must not pass."""

import re
import sys
from pathlib import Path

import pytest
from guides import ROOT, read_commands, run_guide

PAGE = """\
# A guide

First this:

    echo one
    # a comment is no command
    printf '%s-%s\\n' \\
        two \\
        three

- an item,
    which goes on here

```
    echo not a command
```

    echo $WORD > file.txt

Then:

    cat file.txt
"""


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / 'guide.md'
    path.write_text(PAGE)
    return path


@pytest.fixture
def workdir(tmp_path) -> Path:
    (tmp_path / 'work').mkdir()
    return tmp_path / 'work'


def test_commands_are_the_indented_blocks():
    assert read_commands(PAGE) == [
        'echo one', "printf '%s-%s\\n' two three", 'echo $WORD > file.txt',
        'cat file.txt'
    ]


def test_readme_and_method_are_understood():
    commands = read_commands((ROOT / 'README.md').read_text())
    assert 'make quickstart' in commands
    assert not any(c.startswith(('model', '@', '```')) for c in commands)
    for command in commands:
        word = command.split()[0]
        assert word in ('make', 'python') or '/' in word or re.match(
            '(CONFIG|INIT)=', word), command
    method = read_commands((ROOT / 'docs/method.md').read_text())
    assert 'python tools/make_sample_data.py data/sample' in method


def test_runs_in_order_in_its_folder_with_the_environment(page, workdir):
    outputs = run_guide(page, workdir, env=dict(WORD='four'))
    assert outputs['echo one'] == 'one\n'
    assert outputs["printf '%s-%s\\n' two three"] == 'two-three\n'
    assert outputs['cat file.txt'] == 'four\n'
    assert (workdir / 'file.txt').read_text() == 'four\n'


def test_tools_and_interpreter_are_reachable(tmp_path, workdir):
    page = tmp_path / 'page.md'
    page.write_text('Text.\n\n    python -c "import sys, mmrpa; '
                    'print(sys.prefix, mmrpa.__file__)"\n    ls tools\n')
    where, tools = run_guide(page, workdir).values()
    assert where.split()[0] == sys.prefix
    assert str(ROOT / 'mmrpa') in where
    assert 'train.py' in tools.split()


def test_skip_and_replace(page, workdir):
    outputs = run_guide(page, workdir, env=dict(WORD=''), skip=['printf'],
                        replace={'one': 'eins', 'cat file': 'ls file'})
    assert outputs['echo one'] == 'eins\n'
    assert outputs['cat file.txt'] == 'file.txt\n'
    assert len(outputs) == 3


@pytest.mark.parametrize('options, message', [
    (dict(skip=['nowhere']), "contains 'nowhere'"),
    (dict(replace={'nowhere': ''}), "contains 'nowhere'"),
    (dict(skip=['echo', 'printf', 'cat']), 'no command to run'),
    # bash -u: a variable that nobody has set
    (dict(), r'(?s)ended with 1.*WORD: unbound variable'),
    (dict(replace={'echo one': 'echo bad; false'}),
     r'(?s)ended with 1:\nbad\n'),
    (dict(replace={'echo one': 'false | cat'}), 'ended with 1'),
    (dict(replace={'echo one': 'echo slow; sleep 9'}, timeout=0.3),
     r'(?s)took over 0.3 s:\nslow'),
])
def test_what_fails_a_guide(page, workdir, options, message):
    with pytest.raises(AssertionError, match=message):
        run_guide(page, workdir, **options)
