"""Files that are written wholly or not at all."""

import os

import pytest

from mmrpa.whole_files import whole_file


def test_the_name_comes_at_the_end(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('old')
    with whole_file(path) as temporary:
        temporary.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(error, tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('old')
    with pytest.raises(error):
        with whole_file(path) as temporary:
            temporary.write_text('half')
            raise error
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_two_write_one_file_at_once(tmp_path):
    path = tmp_path / 'a.json'
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text('first')
        second.write_text('second')
    assert path.read_text() == 'first'
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_hidden_and_as_readable_as_others(tmp_path):
    mask = os.umask(0o027)
    try:
        with whole_file(tmp_path / 'a.pth', '.x') as temporary:
            assert temporary.name.startswith('.a.pth.')
            assert temporary.suffix == '.x'
    finally:
        os.umask(mask)
    assert (tmp_path / 'a.pth').stat().st_mode & 0o777 == 0o640


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        with whole_file(tmp_path / 'nowhere' / 'a.json'):
            raise AssertionError
