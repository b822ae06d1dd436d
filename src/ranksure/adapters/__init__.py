"""PEFT adapters in and out: configurations, matrices by name, export, rewriting, merging, placing on a network.

Not here: what is measured of a run (``runs``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
