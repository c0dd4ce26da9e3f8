"""Which checkpoint a resume takes: one that is whole, of this training."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from small_training import Recorder, build, damage, weight_files

from mmrpa import resume_search
from mmrpa.resume_search import has_checkpoints, newest_good_checkpoint
from mmrpa.safe_loading import read_training_checkpoint
from mmrpa.weights import CheckpointError


@pytest.mark.parametrize('how', ['cut', 'flipped', 'zeros', 'empty'])
def test_damage_is_found(how, work_dir):
    damage(work_dir / 'iter_18.pth', how)
    assert newest_good_checkpoint(str(work_dir)).endswith('iter_16.pth')


@pytest.mark.parametrize('how', ['cut', 'flipped'])
def test_a_damaged_checkpoint_is_passed_over(how, work_dir, trained, capfd):
    damage(work_dir / 'iter_18.pth', how)
    recorder = Recorder()
    build(work_dir, 'iter', recorder, every=2, resume=True).train()
    assert list(recorder.losses) == [17, 18, 19, 20]
    for step, loss in recorder.losses.items():
        assert loss == pytest.approx(trained[1].losses[step], abs=1e-6)
    printed = ''.join(capfd.readouterr())
    assert f'{work_dir}/iter_18.pth is ' in printed
    assert 'iter_16.pth is the newest checkpoint before it' in printed
    read_training_checkpoint(work_dir / 'iter_18.pth')  # written anew


def test_without_a_whole_checkpoint_nothing_is_trained(work_dir):
    for name in weight_files(work_dir):
        damage(work_dir / name, 'flipped')
    recorder = Recorder()
    with pytest.raises(CheckpointError, match='no checkpoint in .* is whole'
                       ) as caught:
        build(work_dir, 'iter', recorder, resume=True).train()
    assert all(f'iter_{n}.pth is damaged' in str(caught.value)
               for n in (14, 16, 18))
    assert not recorder.losses


@pytest.mark.parametrize('resume', [True, False])
def test_a_named_file_is_taken_or_refused(resume, work_dir):
    """Nothing else is taken in its place; load_from is as strict."""
    recorder = Recorder()
    damage(work_dir / 'iter_18.pth', 'flipped')
    with pytest.raises(CheckpointError, match='iter_18.pth is damaged'):
        build(work_dir, 'iter', recorder, resume=resume,
              load_from=str(work_dir / 'iter_18.pth')).train()
    assert not recorder.losses


def test_the_search(work_dir, tmp_path, caplog):
    """What counts is last_checkpoint; others count where it fails."""

    def found() -> str:
        return Path(newest_good_checkpoint(str(work_dir))).name

    pointer = work_dir / 'last_checkpoint'
    assert found() == 'iter_18.pth'
    # Of an earlier, longer training in the same folder.
    shutil.copy(work_dir / 'iter_14.pth', work_dir / 'iter_900.pth')
    assert found() == 'iter_18.pth'
    damage(work_dir / 'iter_18.pth', 'cut')
    assert found() == 'iter_16.pth'
    (work_dir / 'iter_900.pth').unlink()
    # The folder has another name than when it was written.
    pointer.write_text('/elsewhere/iter_16.pth')
    assert found() == 'iter_16.pth'
    # A full disk or a kill has emptied it.
    shutil.copy(work_dir / 'iter_14.pth', work_dir / 'iter_17.pth')
    for text in ('', '\x00\x00', 'iter_99.pth', 'x' * 5000):
        pointer.write_text(text)
        assert found() == 'iter_17.pth'
    pointer.unlink()
    assert found() == 'iter_17.pth'
    (work_dir / 'best_acc_iter_18.pth').write_bytes(b'no')
    assert found() == 'iter_17.pth'
    assert newest_good_checkpoint(str(tmp_path / 'new')) is None


@pytest.mark.parametrize('gone', [18, 16])
def test_links_to_a_disk_that_is_gone(gone, work_dir):
    link = work_dir / f'iter_{gone}.pth'
    link.unlink()
    link.symlink_to('/no/such/disk/iter.pth')
    assert newest_good_checkpoint(str(work_dir)) == str(
        work_dir / f'iter_{34 - gone}.pth')
    damage(work_dir / f'iter_{34 - gone}.pth', 'cut')
    assert newest_good_checkpoint(str(work_dir)).endswith('iter_14.pth')


@pytest.mark.parametrize('where', ['check_archive', '_candidates'])
def test_a_disk_that_does_not_answer_stops_all_processes(where, work_dir,
                                                         monkeypatch):
    """An older checkpoint is not taken for it: it may answer again."""
    sent = []
    monkeypatch.setattr('mmengine.dist.broadcast_object_list', sent.append)

    def fail(path, *args):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(resume_search, where, fail)
    with pytest.raises(CheckpointError, match='Input/output error') as caught:
        newest_good_checkpoint(str(work_dir))
    assert '--resume FILE' in str(caught.value)
    assert len(sent) == 1  # the others wait for it


@pytest.mark.parametrize('noted', [True, False])
@pytest.mark.parametrize('pointer', ['iter_600.pth', ''])
def test_an_earlier_training_is_not_gone_on_from(noted, pointer, tmp_path,
                                                 monkeypatch):
    """Its files lie between those of the newer one."""
    warnings = []
    monkeypatch.setattr(resume_search, 'warn', warnings.append)
    files = [(250, 1), (500, 2), (750, 3), (300, 11), (600, 12)]
    for step, minute in files:
        path = tmp_path / f'iter_{step}.pth'
        torch.save(dict(meta=dict(time=f'20260102_03{minute:02d}00')
                        if noted else {}), path)
        # What notes no time is judged by its file; a copy has any order.
        second = 10 ** 9 + 60 * minute
        os.utime(path, (second, second))
        if noted and pointer:
            os.utime(path, (10 ** 9 - step, 10 ** 9 - step))
    (tmp_path / 'last_checkpoint').write_text(pointer)
    damage(tmp_path / 'iter_600.pth', 'cut')
    os.utime(tmp_path / 'iter_600.pth')
    assert newest_good_checkpoint(str(tmp_path)) == str(
        tmp_path / 'iter_300.pth')
    told, = (text for text in warnings if text.startswith('passed over'))
    assert 'iter_500.pth' in told and 'iter_300' not in told
    if pointer:
        damage(tmp_path / 'iter_300.pth', 'cut')
        assert newest_good_checkpoint(str(tmp_path)).endswith('iter_250.pth')


def test_a_copied_folder_goes_on_from_its_own_files(work_dir, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(work_dir, copy)
    assert (copy / 'last_checkpoint').read_text().startswith(str(work_dir))
    assert newest_good_checkpoint(str(copy)) == str(copy / 'iter_18.pth')
    # Where out_dir is not work_dir, only the other one has it.
    (copy / 'iter_18.pth').unlink()
    assert newest_good_checkpoint(str(copy)) == str(work_dir / 'iter_18.pth')


@pytest.mark.parametrize('pointer', ['', 'step_9.pth', None])
def test_names_that_tell_nothing_stop_the_training(pointer, tmp_path):
    """Else it would begin anew and write over them."""
    for step in (5, 10):
        torch.save({}, tmp_path / f'step_{step}.pth')
    if pointer is not None:
        (tmp_path / 'last_checkpoint').write_text(pointer)
    with pytest.raises(CheckpointError) as caught:
        newest_good_checkpoint(str(tmp_path))
    assert f'{tmp_path}/step_10.pth, {tmp_path}/step_5.pth' in str(
        caught.value)
    assert '--resume FILE' in str(caught.value)
    assert has_checkpoints(tmp_path)  # load_from is not taken, either
    (tmp_path / 'last_checkpoint').write_text('step_5.pth')
    assert newest_good_checkpoint(str(tmp_path)).endswith('step_5.pth')
