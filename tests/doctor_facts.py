"""Facts about a healthy machine with a GPU, made up, to spoil one by one.

No such machine is at hand: what the rules say of them shows that they read
facts rightly, not that the facts come out so.
"""

import copy

from mmrpa.doctor.report import diagnose

HOSTS = ('mmdet', 'mmseg', 'mmpretrain')
ARCHS = ['sm_75', 'sm_80', 'sm_90', 'sm_120', 'compute_120']
FACTS = {
    'python': [3, 11, 7],
    'checkout': True,
    'platform': 'Linux',
    'distributions': {'setuptools': '81.0.0', 'torchvision': '0.26.0+cu130',
                      'opencv-python-headless': '4.12.0.88', 'ninja': '1',
                      'safetensors': '0.8.0'},
    'owners': {name: [f'onedl-{name}'] for name in (
        'mmengine', 'mmcv', 'mmdet', 'mmpretrain')} | {'mmseg': [], 'cv2': []},
    'requires_torch': '2.11.0',
    'has_ops': True,
    'sources': {},
    'has_pip': True,
    'interpreter': None,
    'requirements': [],
    'gpus': ['NVIDIA H100'],
    'probes': {name: {'found': {'version': '2.2.6'}} for name in (
        'numpy', 'torch and numpy', 'cv2', 'torchvision', 'mmengine', 'mmcv',
        'pycocotools', 'mmdet', 'mmseg', 'mmpretrain')} | {
            'torch': {'found': {
                'version': '2.11.0+cu130', 'cuda': '13.0', 'available': True,
                'archs': ARCHS}},
            'torch.cuda': {'found': {'capabilities': [[9, 0]]}},
            'mmcv.ops': {'found': {'cuda': '13.0'}}},
}


def diagnose_changed(**changes):
    """Findings in the healthy facts but for some, by name."""
    facts = copy.deepcopy(FACTS)
    torch = facts['probes']['torch']['found']
    for key, value in changes.items():
        if key in torch:
            torch[key] = value
        elif key == 'capabilities':
            facts['probes']['torch.cuda']['found'][key] = value
        elif key == 'ops_cuda':
            facts['probes']['mmcv.ops']['found']['cuda'] = value
        else:
            facts[key] = value
    return diagnose(facts)


def without(facts, *names):
    """Take packages out; all that import mmengine fail along with it."""
    for name in names:
        facts['owners'][name] = []
        facts['probes'][name] = {
            'error': f'ModuleNotFoundError: No module named {name!r}',
            'missing': name}
        if name in ('mmcv', 'mmengine'):
            facts['probes']['mmcv.ops'] = facts['probes'][name]
    for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain'):
        if 'mmengine' in names and name not in names:
            facts['probes'][name] = facts['probes']['mmengine']
    return facts
