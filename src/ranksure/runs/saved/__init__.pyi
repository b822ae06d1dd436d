from .open import open_run as open_run
