"""``--cfg-options`` of the command lines."""

import argparse
from typing import Optional, Sequence

from mmengine.config import DictAction as MMEngineDictAction


class DictAction(MMEngineDictAction):
    """mmengine's, but what is no ``KEY=VALUE`` is an error of usage.

    There, a missing ``=`` or bracket ends in a traceback.
    """

    def __call__(self,
                 parser: argparse.ArgumentParser,
                 namespace: argparse.Namespace,
                 values: Sequence[str],
                 option_string: Optional[str] = None) -> None:
        """Parse the values of one occurrence of the option."""
        for value in values:
            key, equals, _ = value.partition('=')
            if not (equals and all(key.split('.'))):
                raise argparse.ArgumentError(
                    self, f'takes KEY=VALUE, got {value!r}')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            raise argparse.ArgumentError(
                self, f'can not read {" ".join(values)!r}: {error}'
            ) from error
