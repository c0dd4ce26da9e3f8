"""``python -m mmrpa.doctor``: what is wrong with an environment, and its cure.

Standard library only: it has to work where nothing else does. Packages that
may be broken are imported in processes of their own (:mod:`.probes`), what
was found there and in their metadata is a dict of facts (:mod:`.facts`), and
rules turn facts into findings (:mod:`.rules`, :mod:`.rules_gpu`).
"""

from .facts import gather_facts
from .findings import Finding
from .report import diagnose, main

__all__ = ['Finding', 'diagnose', 'gather_facts', 'main']
