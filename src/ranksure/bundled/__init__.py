"""Real models and data from public packages, one a file, verified by checksum, and their short names.

Not here: how inputs of any other origin are read (``data``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
