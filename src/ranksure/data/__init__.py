"""Rows as people have them: tables, texts, images, recordings, conversations.

Not here: what a model makes of them (``tasks``), and data that comes from packages (``bundled``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
