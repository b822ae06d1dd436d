"""``report.html``: one page that opens offline, made from what a result folder holds.

What a page is made of is in ``blocks.py``, one section a kind of result in ``sections/``; records are in ``records``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
