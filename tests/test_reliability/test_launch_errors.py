"""What stops a training on purpose is one line, and status 1."""

import pytest
from mmengine.runner import CheckpointLoader, checkpoint, runner

from mmrpa import launch


@pytest.fixture
def host_script(tmp_path, monkeypatch):
    """A function that runs train.py with a script in the host's place."""
    for name in ('TORCH_FORCE_WEIGHTS_ONLY_LOAD',
                 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
        monkeypatch.setenv(name, '0')  # put back at the end
    monkeypatch.setattr(CheckpointLoader, '_schemes',
                        dict(CheckpointLoader._schemes))
    monkeypatch.setattr(checkpoint, 'load_from_http',
                        checkpoint.load_from_http)
    for module in (checkpoint, runner):
        monkeypatch.setattr(module, 'find_latest_checkpoint',
                            module.find_latest_checkpoint)
    config, script = tmp_path / 'config.py', tmp_path / 'script.py'

    def run(text, load_from=None, flags=(), more=''):
        config.write_text(
            f"default_scope = 'mmdet'\nload_from = {load_from!r}\n{more}")
        script.write_text(text)
        monkeypatch.setattr(launch, 'find_script', lambda *args: script)
        launch.run('train', '', [str(config), *flags])

    return run


@pytest.mark.parametrize('error', [
    'from mmrpa.weights import CheckpointError as Error',
    'from mmrpa.safe_loading import CheckpointSaveError as Error'])
def test_one_line(error, host_script, capsys):
    with pytest.raises(SystemExit) as caught:
        host_script(f"{error}\nraise Error('a.pth is damaged')")
    assert caught.value.code == 1
    assert capsys.readouterr().err == 'train.py: error: a.pth is damaged\n'


@pytest.mark.parametrize('hook, told', [
    ("'mmrpa.SafeCheckpointHook'",
     'Checkpoints that were written are as they were'),
    ("'CheckpointHook'",
     'The newest checkpoint may be half-written; --resume checks it')])
def test_a_full_disk_under_a_log(hook, told, host_script, capsys):
    """The log is written oftener than checkpoints, and meets it first."""
    with pytest.raises(SystemExit) as caught:
        host_script("open('/dev/full', 'w').write('x' * 10 ** 5)",
                    more=f'default_hooks = dict(c=dict(type={hook}))')
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        f'train.py: error: No space left on device. {told}: make room, then '
        'start it again with --resume\n')
    with pytest.raises(FileNotFoundError):  # a bug is a bug
        host_script("open('no/such/file')")


@pytest.mark.parametrize('flags', [['--resume'], ['--resume', 'auto'],
                                   ['--resume=auto'], ['--res', '--flag']])
@pytest.mark.parametrize('trained', [True, False])
def test_resume_beside_load_from(trained, flags, host_script, tmp_path,
                                 capsys, monkeypatch):
    """First start: from load_from; later: from the last checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pth').touch()
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    if trained:
        (work_dir / 'iter_2.pth').write_bytes(b'PK')
    host_script('import sys; print(sys.argv[2:])', load_from='a.pth',
                flags=['--work-dir', str(work_dir), *flags])
    printed = capsys.readouterr().out
    last = printed.splitlines()[-1]
    told = "starts from load_from='a.pth'" in printed
    if trained:
        assert str([*flags, '--cfg-options', 'load_from=None'])[1:] in last
        assert not told
    else:
        assert last == str(['--work-dir', str(work_dir),
                            *[f for f in flags if f == '--flag']])
        assert told


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain', 'mmseg'])
def test_resume_beside_load_from_of_the_command_line(scope, host_script,
                                                     tmp_path, capsys,
                                                     monkeypatch):
    """mmdet and mmpretrain forget it; mmseg names by it what to resume."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'b.pth').touch()
    options = ['--work-dir', str(tmp_path / 'work'), '--cfg-options',
               'load_from=b.pth']
    host_script('import sys; print(sys.argv[2:])', load_from='a.pth',
                flags=['--resume', *options],
                more=f'default_scope = {scope!r}')
    printed = capsys.readouterr().out
    kept = ['--resume'] if scope == 'mmseg' else []
    assert printed.splitlines()[-1] == str([*kept, *options])
    assert ("starts from load_from='b.pth'" in printed) == (scope != 'mmseg')


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain', 'mmseg'])
def test_a_first_start_with_resume_has_its_file(scope, host_script, tmp_path,
                                                capsys):
    """mmseg resumes that file, the others start from it."""
    with pytest.raises(SystemExit) as caught:
        host_script('raise AssertionError', flags=[
            '--resume', '--work-dir', str(tmp_path / 'work'), '--cfg-options',
            'load_from=b.pth'], more=f'default_scope = {scope!r}')
    assert caught.value.code == 1
    assert "checkpoint 'b.pth' does not exist" in capsys.readouterr().err


def test_a_first_start_with_resume_in_the_config(host_script, tmp_path,
                                                 capsys, monkeypatch):
    """It is none: mmengine would resume from load_from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pth').touch()
    host_script('import sys; print(sys.argv[2:])', load_from='a.pth',
                flags=['--resume'], more='resume = True')
    assert capsys.readouterr().out.splitlines()[-1] == str(
        ['--cfg-options', 'resume=False'])


@pytest.mark.parametrize('flags', [
    ['--resume'], ['--cfg-options', 'resume=False'], [],
    ['--cfg-options', 'resume=True']])
def test_mmseg_goes_by_its_flag(flags, host_script, capsys):
    """By a config alone it would start anew, and say nothing."""
    settings = dict(flags=flags, more="default_scope = 'mmseg'\n" + (
        'resume = True' if flags != ['--cfg-options', 'resume=True'] else ''))
    if flags in (['--resume'], ['--cfg-options', 'resume=False']):
        host_script('print("started")', **settings)
        assert 'started' in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as caught:
        host_script('raise AssertionError', **settings)
    assert caught.value.code == 1
    assert ('resume=True is in the config, but mmseg goes by its flag alone'
            in capsys.readouterr().err)


@pytest.mark.parametrize('flags', [
    [], ['--resume', 'a.pth'], ['--flag']])
def test_other_flags_are_left_alone(flags, host_script, capsys, tmp_path,
                                    monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pth').touch()
    host_script('import sys; print(sys.argv[2:])', load_from='a.pth',
                flags=flags)
    assert capsys.readouterr().out.splitlines()[-1] == str(flags)


def test_the_host_reads_by_our_reader(host_script, tmp_path, capsys):
    bad = tmp_path / 'bad.pth'
    with pytest.raises(SystemExit) as caught:
        host_script(f"""
import os, pickle, torch
from mmengine.runner import CheckpointLoader
class Bad:
    def __reduce__(self):
        return os.mkdir, ({str(tmp_path / "ran")!r}, )
torch.save(dict(a=Bad()), {str(bad)!r})
try:
    torch.load({str(bad)!r}, weights_only=False)
except pickle.UnpicklingError:
    print('refused')
CheckpointLoader.load_checkpoint({str(bad)!r})
""")
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert 'refused\n' in printed.out
    assert f'train.py: error: {bad} holds more than weights' in printed.err
    assert not (tmp_path / 'ran').exists()
