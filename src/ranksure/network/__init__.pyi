from .gradient import gradient_pass as gradient_pass
from .logits import logits_of as logits_of
from .logits import predict as predict
from .side_path import applied as applied
from .targets import base_layer as base_layer
from .targets import block_shape as block_shape
from .targets import select_targets as select_targets
