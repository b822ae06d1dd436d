from .minilm import minilm_path as minilm_path
from .names import named_data as named_data
from .names import named_model as named_model
