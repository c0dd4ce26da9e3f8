"""tools/survey_swaps.py: limits, going on, groups, tables."""

import json
import operator
import os
import time
from argparse import Namespace

import pytest
from helpers import load_tool


@pytest.fixture(scope='module')
def survey():
    return load_tool('survey_swaps')


@pytest.mark.long
def test_a_worker_survives_its_tasks(survey):
    with survey.Worker(memory=2, timeout=20) as worker:
        process = worker.run(os.getpid)
        assert process == worker.run(os.getpid) != os.getpid()
        for call, error in (
            ((operator.getitem, {}, 'a reason'), "KeyError: 'a reason' ("),
            ((bytearray, 4 * 2**30), 'MemoryError'),
            ((os._exit, 7), 'the process ended with 7'),
            ((time.sleep, 60), 'took over 20 s')):
            result = worker.run(*call)
            assert result['outcome'] == 'failed', call
            assert result['error'].startswith(error)
        assert worker.run(os.getpid) not in (process, os.getpid())


SWAPS = [
    dict(kind='swap', host='mmdet', config='a.py', outcome='swapped',
         backbone='ResNet', model='RPN', arch='rp_pvt_tiny', key='k1'),
    dict(kind='swap', host='mmdet', config='b.py', outcome='swapped',
         backbone='ResNet', model='RPN', arch='rp_pvt_tiny', key='k1'),
    dict(kind='swap', host='mmdet', config='c.py', outcome='swapped',
         backbone='HRNet', model='RPN', arch='rp_pvt_tiny', key='k2'),
    dict(kind='swap', host='mmseg', config='d.py', outcome='refused',
         backbone='UNet', model='E', arch='rp_pvt_tiny', reason='its own',
         detail='UNet'),
    dict(kind='swap', host='mmseg', config='e.py', outcome='unreadable',
         reason='does not parse'),
    dict(kind='swap', host='mmseg', config='f.py', outcome='failed',
         error='took over 1 s'),
]


def test_goes_on_where_it_stopped(survey, tmp_path):
    path = tmp_path / 'results.jsonl'
    state = survey.Survey(path, retry=False)
    for record in SWAPS:
        state.add(record)
    state.add(dict(kind='step', key='k1', outcome='failed', error='x'))
    with path.open('a') as file:
        file.write('{"kind": "sw')  # stopped while writing
    again = survey.Survey(path, retry=False)
    assert len(again.swaps) == 6
    # a.py and b.py give one model, which has been run
    assert [r['config'] for r in again.waiting_steps()] == ['c.py']
    retried = survey.Survey(path, retry=True)
    assert ('mmseg', 'f.py') not in retried.swaps
    assert [r['config'] for r in retried.waiting_steps()] == ['a.py', 'c.py']


def test_models_that_a_dataset_tells_apart_are_one(survey):
    from swap_survey.tasks import model_key
    one = dict(type='A', head=dict(num_classes=80, in_channels=[1, 2]))
    same = dict(type='A', head=dict(num_classes=19, in_channels=(1, 2)),
                test_cfg=dict(mode='slide'))
    other = dict(type='A', head=dict(num_classes=80, in_channels=[1, 3]))
    assert model_key(one) == model_key(same) != model_key(other)


def test_groups_and_tables(survey):
    steps = dict(
        k1=dict(outcome='ran', side=128, without_gradient=[]),
        k2=dict(outcome='failed', error='Key|Error'))
    args = Namespace(arch='rp_pvt_tiny', plain_arch='rp_deit_tiny', timeout=9,
                     memory=8)
    summary = json.loads(json.dumps(survey.summarise(SWAPS, steps, args)))
    counts = {(g['family'], g['outcome']): g['configs']
              for g in summary['groups']}
    assert counts == {('ResNet', 'ran'): 2, ('HRNet', 'failed'): 1,
                      ('other', 'refused'): 1, ('other', 'unreadable'): 1,
                      ('other', 'failed'): 1}
    text = load_tool('update_swap_docs').render(summary)
    rows = [line for line in text.splitlines() if line.startswith('| ')]
    assert '| ResNet | 2 (1) | 0 (0) | 0 (0) | 0 (0) | 2 (1) | 100.0 % | ' \
        '100.0 % |' in rows
    assert '| **these together** | 2 (1) | 0 (0) | 1 (1) | 0 (0) | 3 (2) | ' \
        '66.7 % | 50.0 % |' in rows
    assert '| its own | 1 (1) | 0 | `mmseg::d.py` |' in rows
    assert '| Key/Error | 1 (1) | 1 | `mmdet::c.py` |' in rows
    assert 'Not counted: 1 configs' in text


def test_shipped_configs_are_found(survey):
    found = survey.list_configs('mmseg')
    assert 'fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py' in found
    assert not [name for name in found if '_base_' in name]
    assert found == sorted(found) and len(found) > 500


def test_bad_input(survey, tmp_path, capsys):
    assert survey.main([str(tmp_path / 'nowhere/results.jsonl')]) == 2
    assert 'there is no folder' in capsys.readouterr().err
    docs = load_tool('update_swap_docs')
    page = tmp_path / 'page.md'
    page.write_text('no markers')
    report = tmp_path / 'survey.json'
    assert docs.main(['--survey', str(report), '--page', str(page)]) == 2
    report.write_text('{}')
    assert docs.main(['--survey', str(report), '--page', str(page)]) == 2
    assert page.read_text() == 'no markers'
