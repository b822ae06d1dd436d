"""The question "which rank?" answered: settings, preparation, ranks, subsets, the answer and its files.

The layout of ``plan.json`` is in ``records``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
