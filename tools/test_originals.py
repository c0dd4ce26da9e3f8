"""Run the tests of mmrpa against the original OpenMMLab packages.

The tested set has the onedl-* forks. This makes an environment of its own with
the originals (mmengine 0.10.7, mmcv-lite 2.1.0, mmpretrain 1.2.0, mmdet 3.3.0,
mmsegmentation 1.2.2) on top of the torch of the tested set, once, and runs in
it all tests that touch one of them. docs/originals.md says what that shows,
and what not.
"""

import sys
from pathlib import Path

from other_sets.environment import ROOT, OtherSetError, Recipe
from other_sets.running import Plan, make_parser, run

# Pure Python, all of them. mmcv-lite is mmcv without its compiled operators;
# mmdet 3.3.0 and mmsegmentation 1.2.2 refuse mmcv 2.2.0.
PINS = ('mmengine==0.10.7', 'mmcv-lite==2.1.0', 'mmpretrain==1.2.0',
        'mmdet==3.3.0', 'mmsegmentation==1.2.2')
# What they ask for is in the tested set, but for opencv-python, which must not
# be installed over opencv-python-headless.
RECIPE = Recipe(('--no-deps', *PINS), without=('onedl-', ), operators=True)
# Each path under tests/ that is left out, and why.
LEFT_OUT = {
    'test_ops': 'torch alone, no host',
    'test_layers': 'torch alone, no host',
    'test_geometry.py': 'torch alone, no host',
    'test_guides.py': 'files of the project, no host',
    'test_tools/test_setup_env.py': 'installs the tested set, no host',
    'test_tools/test_sample_scenes.py': 'numpy and OpenCV, no host',
}
# Single tests, by their name after tests/. The first two train the
# quickstart's segmentor; see docs/originals.md.
_CLASS_WEIGHTS = ('mmsegmentation 1.2.2 cannot have class weights and ignored '
                  'pixels at once')
DESELECTED = {
    'test_configs/test_config_steps.py::test_one_step_and_one_prediction'
    '[mmseg/quickstart/rp-pvt-nano_upernet_1xb8-300_sample-128x128.py]':
    _CLASS_WEIGHTS,
    'test_reliability/test_killed.py::test_one_kill': _CLASS_WEIGHTS,
    'test_doctor/test_crafted.py::test_tested_environment_has_no_problems':
    'of the tested set, this is another',
    'test_tools/test_other_sets.py::test_pip_that_fails_is_quoted':
    'makes such an environment, from the tested set',
}
# Meant for continuous integration: about 4 minutes of one core.
QUICK = (
    'test_registry.py', 'test_backbones/test_checkpoint.py', 'test_optim',
    'test_hooks', 'test_weights/test_convert.py',
    'test_weights/test_files.py', 'test_weights/test_runner.py',
    'test_tools/test_dispatch.py',
    'test_tools/test_dist.py::test_two_processes_train_and_test_a_detector',
    'test_tools/test_dist.py::test_one_process_trains_and_tests_a_segmentor')


def main(argv: list[str] | None = None) -> int:
    """Run the tests; return pytest's exit status."""
    parser = make_parser(__doc__)
    parser.add_argument('--env', type=Path, metavar='DIR',
                        default=ROOT / 'build' / 'originals',
                        help='the environment (default: %(default)s)')
    parser.add_argument('--quick', action='store_true',
                        help='only the tests that depend most on the hosts')
    args, pytest_args = parser.parse_known_args(argv)
    plan = Plan(RECIPE,
                ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'torch'),
                QUICK if args.quick else ('', ), LEFT_OUT, DESELECTED)
    try:
        return run(plan, args.env, args.only_prepare, pytest_args)
    except OtherSetError as error:
        print(f'test_originals.py: error: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
