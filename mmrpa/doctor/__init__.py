"""``python -m mmrpa.doctor``: what is wrong with an environment, and its cure.

Standard library only: it has to work where nothing else does. Packages that
may be broken are imported in processes of their own (:mod:`.probes`), what
was found there and in their metadata is a dict of facts (:mod:`.facts`), and
rules turn facts into findings (:mod:`.rules`, :mod:`.rules_gpu`).
"""

import os
import sys

if sys.version_info < (3, 8):  # the rest of this package does not parse there
    sys.exit('problem 1 of 1, python: Python {}.{} is not supported, 3.10 to '
             '3.12 is: the hosts have no releases for others\n    {}'.format(
                 *sys.version_info[:2],
                 'make setup PYTHON=python3.11' if os.path.isfile(
                     os.path.join(os.path.dirname(__file__),
                                  '../../tools/setup_env.py')) else
                 'python3.11 -m venv mmrpa-venv'))

from .facts import gather_facts  # noqa: E402
from .findings import Finding  # noqa: E402
from .report import diagnose, main  # noqa: E402

__all__ = ['Finding', 'diagnose', 'gather_facts', 'main']
