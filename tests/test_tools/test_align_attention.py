"""Attention transfer by the tool: what it makes, resume, processes, errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import TOOLS, load_tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmrpa.transfer import carry_twin
from mmrpa.transfer.align import PhaseHook
from mmrpa.transfer.runs import (
    build_twins,
    find_backbone,
    load_backbone,
    merge_weights,
)
from mmrpa.weights import read_checkpoint

SCHEDULE = ['--layer-epochs', 2, '--feature-epochs', 2, '--batch-size', 2,
            '--num-workers', 0, '--calibration-images', 4, '--lr', 0.01]


@pytest.fixture(scope='module')
def tool():
    return load_tool('align_attention')


@pytest.fixture
def case(configs, data, write_config, tmp_path):
    """A config, a teacher with random weights, images, and an output."""
    config = write_config(configs['mmpretrain'](data))
    cfg = Config.fromfile(config)
    init_default_scope('mmpretrain')
    cfg.model.backbone.attention = 'sr'
    torch.manual_seed(1)
    model = MODELS.build(dict(
        cfg.model, data_preprocessor=cfg.data_preprocessor))
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        torch.nn.init.normal_(parameter, std=2 * fan_in**-0.5)
    teacher = tmp_path / 'teacher.pth'
    torch.save(dict(state_dict=model.state_dict()), teacher)
    return [config, teacher, data / 'cls/train', '--out', tmp_path / 'out.pth']


@pytest.fixture
def plain(case, tmp_path):
    """Weights that were carried only: attention starts at random."""
    backbone, prefix = find_backbone(Config.fromfile(case[0]))
    teacher, student = build_twins(backbone)
    weights = result(case[1])
    found = load_backbone(teacher, weights, 'teacher.pth')
    carry_twin(teacher, student)
    path = tmp_path / 'plain.pth'
    torch.save(merge_weights(student, prefix, weights, found), path)
    return path


def run(tool, case, *options, work='work'):
    # Of an option that is given twice the last one counts.
    arguments = [*case, '--work-dir', case[1].parent / work, *SCHEDULE,
                 *options]
    return tool.main([str(a) for a in arguments])


def result(path):
    return read_checkpoint(path).state_dict


def test_student_learns_what_the_teacher_did(tool, case, plain, capsys):
    assert run(tool, case, '--init', plain, '--layer-epochs', 12) == 0
    checkpoint = read_checkpoint(case[-1])
    before, after = (checkpoint.meta[k] for k in ('before', 'after'))
    for kind in ('layers', 'features'):
        assert sum(after[kind].values()) < 0.7 * sum(before[kind].values())
    own, given = checkpoint.state_dict, result(case[1])
    # The heads and all outside of attention are the teacher's, bit by bit.
    for name, value in own.items():
        if '.attn.' not in name:
            assert torch.equal(value, given[name]), name
    assert {k for k in given if '.attn.' not in k} <= set(own)
    # The config's own model takes it whole.
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(case[0])
    model = MODELS.build(dict(
        cfg.model, data_preprocessor=cfg.data_preprocessor))
    model.load_state_dict(own, strict=True)
    # Progress, with the time that is left and each phase by its name.
    log = next((case[1].parent / 'work').glob('*/*.log')).read_text()
    assert 'eta:' in log and "phase 'features', epoch 13 of 14" in log


def test_interrupted_while_saving_and_resumed(tool, case, tmp_path, capsys):
    assert run(tool, case) == 0
    said = capsys.readouterr().out
    assert said.count('K and V fitted to the reduced map') == 3
    assert said.count('anchors from') == 4
    whole = result(case[-1])

    def interrupt(self, runner):
        if runner.epoch == 2:
            # Killed while the third checkpoint was written.
            (tmp_path / 'cut/epoch_3.pth').write_bytes(b'PK\x03\x04 half')
            raise KeyboardInterrupt
        set_phase(self, runner)

    set_phase = PhaseHook.before_train_epoch
    case[-1] = tmp_path / 'resumed.pth'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseHook, 'before_train_epoch', interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tool, case, work='cut')
    assert not case[-1].exists()
    # Other settings than those of the run to resume.
    capsys.readouterr()
    assert run(tool, case, '--resume', '--seed', 5, work='cut') == 2
    assert 'seed: 0, now 5' in capsys.readouterr().err
    assert run(tool, case, '--resume', work='cut') == 0
    said = capsys.readouterr().out
    assert 'anchors from' not in said  # it did not start anew
    for name, value in result(case[-1]).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize('where, told', [
    ('mmrpa.hooks.safe_checkpoint._note_others', 'seed: 0, now 5'),
    ('mmrpa.transfer.align.PhaseHook.before_train_epoch',
     'are of an earlier training')])
def test_killed_before_its_first_checkpoint(tool, case, tmp_path, capsys,
                                            where, told):
    """The weights of the run before it must not get its name."""
    assert run(tool, case) == 0

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tool, case, '--seed', 5)
    capsys.readouterr()
    case[-1] = tmp_path / 'resumed.pth'
    assert run(tool, case, '--seed', 5, '--resume') == 2
    assert told in capsys.readouterr().err
    assert not case[-1].exists()


@pytest.mark.parametrize('lost, told', [
    ('last_checkpoint', 'seed: 0, now 5'),
    ('align_attention.json', 'has checkpoints, but no align_attention.json')])
def test_a_lost_file_hides_no_other_settings(tool, case, tmp_path, capsys,
                                             lost, told):
    assert run(tool, case) == 0
    (tmp_path / 'work' / lost).unlink()
    capsys.readouterr()
    assert run(tool, case, '--seed', 5, '--resume') == 2
    assert told in capsys.readouterr().err


def test_started_again_by_the_launcher(tool, case, tmp_path, monkeypatch,
                                       capsys):
    """MAX_RESTARTS, without --resume: it goes on, once there is a file."""

    def die(self, runner):
        if runner.epoch == dies_in:
            raise KeyboardInterrupt
        seen.append(runner.epoch)
        set_phase(self, runner)

    set_phase = PhaseHook.before_train_epoch
    monkeypatch.setattr(PhaseHook, 'before_train_epoch', die)
    monkeypatch.setenv('MMRPA_LAUNCHED', str(int(time.time())))
    for count, (dies_in, expected) in enumerate([
            (0, []), (2, [0, 1]), (None, [2, 3])]):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(count))
        seen = []
        if dies_in is None:
            assert run(tool, case) == 0
        else:
            with pytest.raises(KeyboardInterrupt):
                run(tool, case)
        assert seen == expected
    assert 'restart 2: the training goes on' in capsys.readouterr().out


@pytest.mark.parametrize('what', ['checkpoint', 'weights'])
def test_a_full_disk_is_one_sentence(tool, case, monkeypatch, capsys, what):
    name = dict(
        checkpoint='mmrpa.hooks.safe_checkpoint.put_in_place',
        weights='pathlib.Path.write_bytes')[what]

    def fail(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(name, fail)
    assert run(tool, case) == 2
    error = capsys.readouterr().err
    assert 'No space left on device' in error and 'Traceback' not in error
    assert not case[-1].exists()


def test_killed_and_resumed(case, tool, tmp_path):
    """The real thing: SIGKILL at any point, here after an epoch."""
    command = [*case, '--work-dir', tmp_path / 'killed', *SCHEDULE,
               '--feature-epochs', 12]
    env = dict(os.environ, PYTHONPATH=str(TOOLS.parent), OMP_NUM_THREADS='1',
               CUDA_VISIBLE_DEVICES='')
    process = subprocess.Popen(
        [sys.executable, TOOLS / 'align_attention.py', *map(str, command)],
        env=env, cwd=tmp_path, stdout=subprocess.DEVNULL)
    mark = tmp_path / 'killed/last_checkpoint'
    deadline = time.monotonic() + 120
    while not (mark.exists() and 'epoch_' in mark.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not case[-1].exists()
    assert run(tool, case, '--feature-epochs', 12, '--resume',
               work='killed') == 0
    resumed = result(case[-1])
    assert run(tool, case, '--feature-epochs', 12, work='whole') == 0
    for name, value in result(case[-1]).items():
        assert torch.equal(value, resumed[name]), name


def test_two_processes_learn_as_one(tool, case, run_tool, tmp_path):
    assert run(tool, case) == 0
    single = result(case[-1])
    done = run_tool('dist_align_attention.sh', *case[:3], 2, '--out',
                    tmp_path / 'two.pth', '--work-dir', tmp_path / 'two',
                    *SCHEDULE)
    assert done.returncode == 0, done.stdout
    assert 'Distributed training: True' in done.stdout
    assert done.stdout.count('anchors from') == 4  # by one of the two alone
    double = result(tmp_path / 'two.pth')
    moved = 0.
    start = run_start(tool, case, tmp_path)
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=0, atol=1e-4)
        moved = max(moved, (value - start[name]).abs().max().item())
    assert moved > 1e-2  # the tolerance is far below what training did


def run_start(tool, case, tmp_path):
    """The weights before the first step: a rate of next to nothing."""
    args = [*case[:3], '--out', tmp_path / 'start.pth']
    assert run(tool, args, '--lr', 1e-12, '--layer-epochs', 1,
               '--feature-epochs', 0, work='start') == 0
    return result(args[-1])


def test_amp_init_and_other_choices(tool, case, plain, tmp_path, capsys):
    start = result(plain)
    args = [*case[:3], '--out', tmp_path / 'amp.safetensors', '--init',
            plain, '--layer-epochs', 8, '--amp', 'bfloat16', '--num-images', 3,
            '--num-workers', 1, '--size', 48, 64, '--feature-epochs', 0]
    capsys.readouterr()
    assert run(tool, args, work='amp') == 0
    assert 'anchors from' not in capsys.readouterr().out
    checkpoint = read_checkpoint(tmp_path / 'amp.safetensors')
    assert checkpoint.meta['settings']['amp'] == 'bfloat16'
    before, after = (checkpoint.meta[k] for k in ('before', 'after'))
    assert sum(after['layers'].values()) < 0.8 * sum(
        before['layers'].values())
    assert any(not torch.equal(checkpoint.state_dict[k], v)
               for k, v in start.items())
    assert all(v.dtype == start[k].dtype
               for k, v in checkpoint.state_dict.items())


@pytest.mark.parametrize('change, options, message', [
    (dict(images='no/such'), [], "'no/such' is not a folder"),
    (dict(images='empty'), [], 'no images in'),
    (dict(images='broken'), [], 'broken.png'),
    (dict(images='broken'), ['--num-workers', 1, '--calibration-images', 1,
                             '--seed', 1], 'broken.png'),
    (dict(config='none.py'), [], "config 'none.py' does not exist"),
    (dict(config='bad.py'), [], 'bad.py'),
    (dict(), ['--cfg-options', 'model.backbone.type=ResNet'],
     "got 'ResNet'"),
    (dict(), ['--cfg-options', 'model.backbone.attention=sr'],
     'same attention in all layers'),
    (dict(), ['--cfg-options', 'model.backbone.arch.depths=(1,1,1,2)'],
     'does not fit'),
    (dict(teacher='none.pth'), [], "'none.pth' does not exist"),
    (dict(teacher='cut.pth'), [], 'cut.pth is damaged'),
    (dict(teacher='other.pth'), [], 'no weights of a backbone of mmrpa'),
    (dict(), ['--out', 'out.txt'], 'must be a file that ends in .pth'),
    (dict(), ['--out', 'no/such/out.pth'], 'folder of the output'),
    (dict(), ['--batch-size', 9], 'batch_size=9'),
    (dict(), ['--num-images', 9], '9 images are asked for'),
    (dict(), ['--layer-epochs', 0, '--feature-epochs', 0], 'both 0'),
    (dict(), ['--lr', 0], 'lr is 0.0'),
    (dict(), ['--amp'], "amp='float16' needs a GPU"),
    (dict(), ['--launcher', 'pytorch'], 'dist_align_attention.sh'),
    (dict(), ['--launcher', 'slurm'], 'needs GPUs'),
], ids=lambda v: '-'.join(map(str, v)) if isinstance(v, list) else None)
def test_bad_input(tool, case, tmp_path, monkeypatch, capsys, change, options,
                   message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    for i, image in enumerate(sorted(case[2].glob('*/*.png'))):
        (tmp_path / f'broken/{i}.png').write_bytes(image.read_bytes())
    (tmp_path / 'broken/broken.png').write_bytes(image.read_bytes()[:99])
    (tmp_path / 'bad.py').write_text('model = dict(')
    (tmp_path / 'cut.pth').write_bytes(case[1].read_bytes()[:500])
    torch.save(dict(state_dict={'conv.weight': torch.zeros(1)}),
               tmp_path / 'other.pth')
    for i, name in enumerate(('config', 'teacher', 'images')):
        case[i] = change.get(name, case[i])
    before = sorted(tmp_path.glob('*.pth'))
    arguments = [*case, *SCHEDULE, *options]
    assert tool.main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and 'Traceback' not in said
    assert len(said.strip().splitlines()) <= 6
    assert sorted(tmp_path.glob('*.pth')) == before
    assert not (tmp_path / 'out.pth').exists()


def test_processes_without_launcher(tool, case, tmp_path, monkeypatch,
                                    capsys):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    before = sorted(tmp_path.iterdir())
    assert run(tool, case) == 2
    said = capsys.readouterr().err
    assert 'WORLD_SIZE=2: this is one of 2 processes' in said
    assert 'tools/dist_align_attention.sh' in said
    assert sorted(tmp_path.iterdir()) == before


def test_record_of_a_run_is_json(tool, case, tmp_path):
    assert run(tool, case, '--layer-epochs', 0, '--feature-epochs', 1) == 0
    record = json.loads((tmp_path / 'work/align_attention.json').read_text())
    assert record['settings']['size'] == [64, 64]
    assert record['teacher'] == 'teacher.pth'
