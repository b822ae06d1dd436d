"""Model and data together, one kind a file: text, prompt, image, speech; the head; the linearised problem.

A new kind is one file and one row in ``load.py``. Reading rows is in ``data``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
