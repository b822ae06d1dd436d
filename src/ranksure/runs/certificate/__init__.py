"""Is a run done, and is its rank the limit? From one gradient pass.

The mathematics of it is in ``relinearised.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
