"""How signatures are checked while the tests run; ``conftest.py`` names ``checked``."""

from typing import Self

from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeClawDecorWarning

checked = beartype(
    conf=BeartypeConf(
        # The import hook decorates methods one by one, where Self has no meaning.
        hint_overrides=FrozenDict({Self: object}),
        # A signature that cannot be checked is told, and does not stop the import.
        warning_cls_on_decorator_exception=BeartypeClawDecorWarning,
    )
)
