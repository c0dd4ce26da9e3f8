"""Broken data sets: each is found, named, and nothing else is reported.

How each is broken is in tests/broken_data.
"""

import json

import pytest
from broken_data import CASES

from mmrpa.data_checks import check_data
from mmrpa.data_checks.findings import NOTES, PROBLEMS


def codes(report) -> list[str]:
    return [group.code for group in report.findings.problems]


@pytest.mark.parametrize('host, code, holds, break_it', CASES)
def test_broken(host, code, holds, break_it, make):
    data = make(host)
    break_it(data)
    data.save()
    report = check_data(data.cfg)
    assert set(codes(report)) == {code}
    assert holds in report.findings.problems[0].examples[0]
    assert report.num_problems == sum(g.count
                                      for g in report.findings.problems)
    # It can be printed and written, whatever it holds.
    '\n'.join(report.findings.lines()).encode()
    json.dumps(report.record())


def test_every_kind_is_tested():
    assert len(CASES) >= 60
    assert {param.values[1] for param in CASES} == set(PROBLEMS)
    assert not set(PROBLEMS) & set(NOTES)


@pytest.mark.parametrize('host', ['mmdet', 'mmseg', 'mmpretrain'])
def test_clean(host, make):
    report = check_data(make(host).cfg, ('train', 'val', 'test'))
    assert report.findings.problems == []
    assert report.findings.notes == []
    assert sorted(report.histograms) == [
        'train_dataloader.dataset', 'val_dataloader.dataset']
