from .callback import CertificateCallback as CertificateCallback
