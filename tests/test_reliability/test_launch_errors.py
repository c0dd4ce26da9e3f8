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
    config.write_text("default_scope = 'mmdet'")

    def run(text):
        script.write_text(text)
        monkeypatch.setattr(launch, 'find_script', lambda *args: script)
        launch.run('train', '', [str(config)])

    return run


@pytest.mark.parametrize('error', [
    'from mmrpa.weights import CheckpointError as Error',
    'from mmrpa.safe_loading import CheckpointSaveError as Error'])
def test_one_line(error, host_script, capsys):
    with pytest.raises(SystemExit) as caught:
        host_script(f"{error}\nraise Error('a.pth is damaged')")
    assert caught.value.code == 1
    assert capsys.readouterr().err == 'train.py: error: a.pth is damaged\n'


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
