from .head import HeadFit as HeadFit
from .head import fit_head as fit_head
from .load import load_samples as load_samples
from .load import load_task as load_task
from .task import Task as Task
from .text import TextTask as TextTask
from .text import load_text_task as load_text_task
