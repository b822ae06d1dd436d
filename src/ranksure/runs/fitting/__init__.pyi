from .result import FitResult as FitResult
from .settings import FitSettings as FitSettings
