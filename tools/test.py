"""Test a checkpoint with a config of mmdet, mmseg or mmpretrain.

Reads default_scope of the config and runs that host's own test.py, with all
flags that it knows (--work-dir, --out, --show-dir, --tta, --launcher,
--cfg-options ...; "test.py CONFIG CHECKPOINT --help" lists them). CONFIG and
CHECKPOINT, a file or a URL, come first. Before that, dataset paths, classes
and num_classes are checked, and before the first image that CHECKPOINT fills
the whole model: it may hold more, but a model whose head stays random is not
tested. Nor are images of one name in several folders, which --show-dir and
mmseg's --out would write to one file.

  --no-preflight   leave out these checks
  --allow-subset   accept COCO files with more categories than the config has
"""

import sys

try:
    from mmrpa.launch import run
except ModuleNotFoundError as error:
    if error.name != 'mmrpa':
        raise
    sys.exit(f'mmrpa is not installed for {sys.executable}: run '
             '"pip install -e ." in the folder above tools/')

if __name__ == '__main__':
    run('test', __doc__, sys.argv[1:])
