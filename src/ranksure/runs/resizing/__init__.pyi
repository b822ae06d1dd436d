from .compress_result import Compression as Compression
from .grow import Growth as Growth
