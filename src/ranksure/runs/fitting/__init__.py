"""Training at planned ranks with the decay of the theory, resumable, certified and compared with the plan."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
