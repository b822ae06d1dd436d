"""Results on disk: one type for each JSON file, by which it is written, checked and read.

Here are their contents and what can be read off them. How a result is found is in ``planner``, ``runs`` and ``lab``,
how it is shown in ``report``. A record of another schema number is refused with a line that names both numbers.
"""

from typing import Any

from ranksure.records.certificate import ModuleVerdict, Probe, RunCertificate
from ranksure.records.change import CompressRecord, GrowRecord
from ranksure.records.claims import LabRecord, ReproductionRecord
from ranksure.records.fit import Fit
from ranksure.records.plan import Plan
from ranksure.records.record import checked, encoded, parsed, plain, read

KINDS: dict[str, Any] = {
    "plan": Plan,
    "fit": Fit,
    "certificate": RunCertificate,
    "grow": GrowRecord,
    "compress": CompressRecord,
    "reproduce": ReproductionRecord,
    "lab": LabRecord,
}
"""Type by kind of record, in the order of a page."""

__all__ = [
    "KINDS",
    "CompressRecord",
    "Fit",
    "GrowRecord",
    "LabRecord",
    "ModuleVerdict",
    "Plan",
    "Probe",
    "ReproductionRecord",
    "RunCertificate",
    "checked",
    "encoded",
    "parsed",
    "plain",
    "read",
]
