"""How files are listed, and datasets built, to be checked."""

import os

import pytest
from mmseg.datasets import BaseSegDataset

from mmrpa.data_checks import check_data
from mmrpa.data_checks.context import Options


class _Counted:
    """What os.scandir gives, with a count of what was taken."""

    def __init__(self, entries, taken: list) -> None:
        self.entries, self.taken = entries, taken

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.entries.close()

    def __iter__(self):
        return self

    def __next__(self):
        entry = next(self.entries)
        self.taken.append(entry.name)
        return entry


def test_a_quick_check_lists_no_further_than_it_reads(make, monkeypatch):
    data = make('mmpretrain')
    folder = data.root / 'train/disc'
    for number in range(300):
        (folder / f'{number}.jpg').symlink_to(next(folder.iterdir()))
    original, taken = os.scandir, []
    monkeypatch.setattr(os, 'scandir', lambda path: (
        _Counted(original(path), taken) if str(path).endswith('train/disc')
        else original(path)))
    report = check_data(data.cfg, ('train', ), Options(10, quick=True))
    assert report.findings.problems == []
    assert report.histograms['train_dataloader.dataset'].samples['disc'] == 2
    assert len([name for name in taken if name.endswith('.jpg')]) == 2


@pytest.mark.parametrize('host, folder', [
    ('mmseg', 'images/training'), ('mmpretrain', 'train/disc')])
@pytest.mark.parametrize('quick', [False, True])
def test_a_folder_that_cannot_be_listed(host, folder, quick, make,
                                        monkeypatch):
    """Its files are not left out without a word. (Root can list it all.)"""
    data = make(host)
    locked = data.root / folder / 'locked'
    locked.mkdir()
    original = os.scandir

    def scandir(path):
        if str(path) == str(locked):
            raise PermissionError(13, 'Permission denied', str(path))
        return original(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    report = check_data(data.cfg, ('train', ), Options(100, quick=quick))
    group, = report.findings.problems
    assert group.code == 'unreadable-file'
    assert group.examples == [f'{locked}: Permission denied']


class WithoutLazyInit(BaseSegDataset):
    """As a user may write it."""

    def __init__(self, data_root, data_prefix, pipeline):
        raise AssertionError('it would read all of its files')


class Mistaken(BaseSegDataset):

    def __init__(self, **kwargs):
        raise RuntimeError('a mistake of its code')


def use(data, cls: type, *names: str) -> None:
    data.cfg.train_dataloader.dataset = dict(
        type=cls, **{name: data.train[name] for name in names})


def test_a_dataset_that_takes_no_lazy_init(make):
    data = make('mmseg')
    use(data, WithoutLazyInit, 'data_root', 'data_prefix', 'pipeline')
    report = check_data(data.cfg, ('train', ))
    assert [g.code for g in report.findings.problems
            if g.code == 'dataset-arguments'] == []
    assert any(code == 'unchecked' and 'it takes no lazy_init' in text
               for code, _, text in report.findings.notes)
    # It is the config's mistake if that has the argument.
    data.cfg.train_dataloader.dataset.lazy_init = False
    assert 'dataset-arguments' in {
        g.code for g in check_data(data.cfg, ('train', )).findings.problems}


def test_a_mistake_in_a_dataset_is_not_the_configs(make):
    data = make('mmseg')
    use(data, Mistaken, 'data_root', 'data_prefix', 'pipeline')
    with pytest.raises(RuntimeError):
        check_data(data.cfg, ('train', ))
