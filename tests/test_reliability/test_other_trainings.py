"""Checkpoints of other trainings: not removed, not mistaken for one's own."""

import shutil
from pathlib import Path

import pytest
from small_training import Killed, Recorder, build, weight_files

from mmrpa.earlier import find_earlier, note_earlier
from mmrpa.hooks import SafeCheckpointHook
from mmrpa.resume_search import has_checkpoints, newest_good_checkpoint
from mmrpa.weights import CheckpointError


class Judged(Recorder):
    """Hand results of validations to the hook that keeps the best.

    Args:
        scores (dict): Metrics by step.
    """

    def __init__(self, scores: dict[int, dict[str, float]],
                 kill_after: int | None = None) -> None:
        super().__init__(kill_after)
        self.scores = scores

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        step = runner.iter + 1
        if step in self.scores:
            hook, = (hook for hook in runner.hooks
                     if isinstance(hook, SafeCheckpointHook))
            runner._train_loop._iter += 1  # as after the step
            hook.after_val_epoch(runner, self.scores[step])
            runner._train_loop._iter -= 1
        super().after_train_iter(runner, *args, **kwargs)


def judge(folder: Path, scores: dict, metric: str = 'acc',
          kill_after: int | None = None, **settings) -> Judged:
    """Train with checkpoints every 4 steps and the best one."""
    recorder = Judged({step: {metric: score}
                       for step, score in scores.items()}, kill_after)
    runner = build(folder, 'iter', recorder, every=4, save_best=metric,
                   **settings)
    if kill_after is None:
        runner.train()
    else:
        with pytest.raises(Killed):
            runner.train()
    return recorder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob('*.pth')}


@pytest.fixture
def first(tmp_path) -> Path:
    """A training that was killed after 13 steps; its best was at step 4."""
    judge(tmp_path / 'first', {4: 0.5}, kill_after=13)
    assert weight_files(tmp_path / 'first') == [
        'iter_4.pth', 'iter_8.pth', 'iter_12.pth', 'best_acc_iter_4.pth']
    return tmp_path / 'first'


def test_best_of_the_training_that_it_was_copied_from(first, tmp_path):
    before = contents(first)
    copy = tmp_path / 'copy'
    shutil.copytree(first, copy)
    judge(copy, {16: 0.7}, resume=True)
    assert contents(first) == before
    assert weight_files(copy) == ['iter_12.pth', 'iter_16.pth', 'iter_20.pth',
                                  'best_acc_iter_16.pth']


@pytest.mark.parametrize('score', [0.4, 0.7])
def test_best_of_the_training_that_it_goes_on_from(score, first, tmp_path):
    before = contents(first)
    branch = tmp_path / 'branch'
    judge(branch, {16: score}, resume=True,
          load_from=str(first / 'iter_12.pth'))
    assert contents(first) == before
    best = ['best_acc_iter_16.pth'] if score > 0.5 else []
    assert weight_files(branch) == ['iter_16.pth', 'iter_20.pth', *best]


def test_best_of_a_folder_that_was_moved(first, tmp_path):
    moved = tmp_path / 'moved'
    first.rename(moved)
    judge(moved, {16: 0.4}, resume=True)
    assert 'best_acc_iter_4.pth' in weight_files(moved)
    judge(moved, {18: 0.7}, resume=True,
          load_from=str(moved / 'iter_16.pth'))
    assert 'best_acc_iter_4.pth' not in weight_files(moved)


def test_numbers_of_another_training_remove_nothing(trained, work_dir):
    """iter_18.pth of one says to keep 12 to 18; the other has such files."""
    before = contents(work_dir)
    recorder = Recorder(kill_after=19)
    settings = dict(every=2, max_keep=1, resume=True,
                    load_from=str(trained[0] / 'iter_18.pth'))
    with pytest.raises(Killed):
        build(work_dir, 'iter', recorder, **settings).train()
    assert contents(work_dir) == before
    build(work_dir, 'iter', Recorder(), **settings).train()
    after = contents(work_dir)
    assert after.pop('iter_20.pth')
    assert after == before


def test_a_branch_that_keeps_all(first, tmp_path):
    """The file says which to keep, the config says that none is removed."""
    judge(tmp_path / 'branch', {}, resume=True, max_keep=-1,
          load_from=str(first / 'iter_12.pth'))
    assert weight_files(tmp_path / 'branch') == ['iter_16.pth', 'iter_20.pth']


def test_superfluous_folders_of_deepspeed(work_dir):
    (work_dir / 'iter_14.pth').unlink()
    (work_dir / 'iter_14.pth').mkdir()
    (work_dir / 'iter_14.pth/part').touch()
    build(work_dir, 'iter', Recorder(), every=2, max_keep=1,
          resume=True).train()
    assert weight_files(work_dir) == ['iter_20.pth']


def test_what_is_too_much_is_removed_after_the_next(work_dir):
    """mmengine removes it at the start."""
    names = weight_files(work_dir)
    with pytest.raises(Killed):
        build(work_dir, 'iter', Recorder(kill_after=19), every=2, max_keep=1,
              resume=True).train()
    assert weight_files(work_dir) == names
    build(work_dir, 'iter', Recorder(), every=2, max_keep=1,
          resume=True).train()
    assert weight_files(work_dir) == ['iter_20.pth']


@pytest.mark.parametrize('old, new, score', [
    ('acc', 'mIoU', 0.3), ('acc', 'mIoU', 99.), ('acc_top1', 'acc', 0.3),
    ('coco/bbox_mAP', 'coco/segm_mAP', 0.3)])
def test_scores_of_two_metrics(old, new, score, tmp_path, capfd):
    judge(tmp_path, {4: 60.}, old, kill_after=9)
    judge(tmp_path, {12: score}, new, resume=True)
    files = weight_files(tmp_path)
    assert f'best_{new}_iter_12.pth'.replace('/', '_') in files
    assert f'best_{old}_iter_4.pth'.replace('/', '_') in files
    assert f'by another metric than {new}' in ''.join(capfd.readouterr())


def test_scores_of_one_metric(tmp_path, capfd):
    judge(tmp_path, {4: 0.6}, 'coco/bbox_mAP', kill_after=9)
    judge(tmp_path, {12: 0.5, 16: 0.7}, 'coco/bbox_mAP', resume=True)
    assert [name for name in weight_files(tmp_path) if 'best' in name] == [
        'best_coco_bbox_mAP_iter_16.pth']
    assert 'another metric' not in ''.join(capfd.readouterr())


def start(folder: Path, kill_after: int, **settings) -> Recorder:
    recorder = Recorder(kill_after=kill_after)
    with pytest.raises(Killed):
        build(folder, 'iter', recorder, every=2, **settings).train()
    return recorder


@pytest.mark.parametrize('copied', [False, True])
def test_killed_before_its_first_checkpoint(copied, work_dir, tmp_path, capfd):
    """A resume must not go on with the training that was there before."""
    before = contents(work_dir)
    start(work_dir, 1)
    assert ('has checkpoints of an earlier training, iter_14.pth, '
            'iter_16.pth, iter_18.pth.') in ''.join(capfd.readouterr())
    if copied:
        work_dir = Path(shutil.copytree(work_dir, tmp_path / 'copy'))
    assert has_checkpoints(work_dir)  # else it would begin from load_from
    recorder = Recorder()
    with pytest.raises(CheckpointError, match='of an earlier training: the one'
                       r' that was started last.*--resume .*iter_18\.pth\)'):
        build(work_dir, 'iter', recorder, resume=True).train()
    assert not recorder.losses
    assert contents(work_dir) == before


def test_killed_after_its_first_checkpoint(work_dir):
    """The earlier one has more steps, in files and in last_checkpoint."""
    start(work_dir, 1)
    start(work_dir, 3)
    assert weight_files(work_dir)[:2] == ['iter_2.pth', 'iter_14.pth']
    assert list(start(work_dir, 5, resume=True).losses) == [3, 4, 5]
    # What the name of the newest was in is lost.
    (work_dir / 'last_checkpoint').unlink()
    assert list(start(work_dir, 6, resume=True).losses) == [5, 6]


def test_same_step_as_in_the_earlier_training(work_dir):
    """The new file has an old name, and is the new training's."""
    start(work_dir, 15)
    assert list(start(work_dir, 16, resume=True).losses) == [15, 16]


def test_earlier_training_that_the_user_names(work_dir):
    start(work_dir, 1)
    old = str(work_dir / 'iter_16.pth')
    start(work_dir, 17, resume=True, load_from=old)
    # That has said what they are: these of the training that goes on.
    assert newest_good_checkpoint(str(work_dir)).endswith('iter_18.pth')


def test_folder_without_an_earlier_training(work_dir, tmp_path):
    start(work_dir, 1)
    for name in weight_files(work_dir):
        (work_dir / name).unlink()
    start(work_dir, 1)
    assert not (work_dir / 'earlier_checkpoints').exists()
    assert newest_good_checkpoint(str(work_dir)) is None


def test_notes_tell_files_of_one_name_apart(work_dir):
    paths = [work_dir / f'iter_{n}.pth' for n in (14, 16)]
    note_earlier(work_dir, paths)
    assert find_earlier(work_dir, paths) == set(paths)
    shutil.copy(work_dir / 'iter_18.pth', paths[1])
    assert find_earlier(work_dir, paths) == {paths[0]}
    note_earlier(work_dir, ())
    assert find_earlier(work_dir, paths) == set()


@pytest.mark.parametrize('at, byte', [
    (6, 99),  # the version of zip that is needed
    (46, 0xff)])  # a name, no longer UTF-8
def test_a_damaged_table_is_noted(at, byte, work_dir):
    """Of an earlier training; else no new one could start in the folder."""
    path = work_dir / 'iter_16.pth'
    content = bytearray(path.read_bytes())
    content[content.index(b'PK\1\2') + at] = byte
    path.write_bytes(content)
    note_earlier(work_dir, [path])
    assert find_earlier(work_dir, [path]) == {path}
    assert list(start(work_dir, 15, resume=False).losses)[0] == 1


def test_a_path_with_a_tilde_is_in_its_folder(work_dir, monkeypatch):
    monkeypatch.setenv('HOME', str(work_dir.parent))
    start(work_dir, 17, resume=True,
          load_from=f'~/{work_dir.name}/iter_16.pth')
    assert not (work_dir / 'earlier_checkpoints').exists()
