from .config import lora_config as lora_config
from .export import export_adapter as export_adapter
from .export import export_mean_pooled as export_mean_pooled
from .loaded import read_adapter as read_adapter
from .rewrite import Rewritten as Rewritten
from .rewrite import rewrite_adapter as rewrite_adapter
