from .certificate.callback import CertificateCallback as CertificateCallback
from .certificate.certify import certify as certify
from .fitting.fit import fit as fit
from .resizing.compress import compress as compress
from .resizing.grow import grow as grow
