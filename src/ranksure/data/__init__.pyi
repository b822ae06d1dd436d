from .conversations import Examples as Examples
from .conversations import load_examples as load_examples
from .samples import Samples as Samples
from .texts import Rows as Rows
from .texts import load_rows as load_rows
