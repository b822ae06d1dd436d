"""A torch network as a function: logits, target modules, the one hook, batch losses, the gradient pass, side paths.

Not here: the linear map that a capture makes of it (``operators``), and adapters of PEFT (``adapters``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
