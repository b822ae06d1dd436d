"""Algorithms for the convex problem, and one for the network itself, one a file.

Each returns a point with its certificate, a status and a remedy. The problem itself is in ``problem.py``, the proof in
``certificate.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
