"""The theorems as functions: rank bounds, rank reduction, stationarity, perturbation, generalisation.

What is measured about them is in ``lab``; derivations are in ``docs/theory``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
