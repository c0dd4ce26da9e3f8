"""A training that several files take checkpoints from."""

import shutil
from pathlib import Path

import pytest
from small_training import Recorder, build, weight_files


@pytest.fixture(autouse=True)
def no_compilers(monkeypatch):
    """A Runner asks compilers for their versions, which takes a second."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)


@pytest.fixture(scope='session')
def trained(tmp_path_factory) -> tuple[Path, Recorder]:
    """A training with checkpoints at steps 14, 16, 18 and 20; not to touch."""
    folder, recorder = tmp_path_factory.mktemp('trained'), Recorder()
    build(folder, 'iter', recorder, every=2, max_keep=4).train()
    assert weight_files(folder) == [f'iter_{n}.pth' for n in (14, 16, 18, 20)]
    return folder, recorder


@pytest.fixture
def work_dir(trained, tmp_path) -> Path:
    """A copy of the training as it was after step 18."""
    target = tmp_path / 'work'
    shutil.copytree(trained[0], target)
    (target / 'iter_20.pth').unlink()
    (target / 'last_checkpoint').write_text(str(target / 'iter_18.pth'))
    return target
