from .result import PlanResult as PlanResult
from .run import plan as plan
from .settings import PlanSettings as PlanSettings
