"""Train a config of mmdet, mmseg or mmpretrain.

Reads default_scope of the config and runs that host's own train.py, with all
flags that it knows (--work-dir, --resume, --amp, --auto-scale-lr, --launcher,
--cfg-options ...; "train.py CONFIG --help" lists them). CONFIG comes first.
Before that, dataset paths, classes and num_classes are checked, and a part of
the data if the config has DataCheckHook. --amp works on the CPU as well, in
the dtype that optim_wrapper.dtype names (bfloat16).

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
    run('train', __doc__, sys.argv[1:])
