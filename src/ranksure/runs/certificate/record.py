"""``certificate.json``: what it holds beyond the certificate, and writing it whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksure.errors import DataError, SettingError
from ranksure.files import try_to_write, write_or_refuse
from ranksure.losses import Kind
from ranksure.network.targets import base_network, block_shape
from ranksure.records.certificate import RunCertificate
from ranksure.records.record import encoded, read

if TYPE_CHECKING:
    from ranksure.runs.saved.base import LoadedRun
    from ranksure.runs.saved.data import RunData

NAME = "certificate.json"


def sampled(found: RunCertificate, seen: int, total: int) -> RunCertificate:
    """The figures of a subsample, without the verdict that they would not support."""
    reason = (
        f"only {seen:,} of {total:,} rows were read, and a sample gives no verdict: even where the run is optimal on "
        "all of its data, the gradient of a sample is not zero, and its bounds are too large"
    )
    modules = {name: replace(state, verdict="not-checked") for name, state in found.modules.items()}
    return replace(found, verdict="not-checked", modules=modules, reasons=[*found.reasons, reason])


def full_record(found: RunCertificate, run: LoadedRun, data: RunData, command: str | None = None) -> RunCertificate:
    """The certificate with what it is a certificate of."""
    network = base_network(run.model)
    modules = {
        name: replace(state, parameters=state.rank * sum(block_shape(network.get_submodule(name))))
        for name, state in found.modules.items()
    }
    return replace(
        found,
        modules=modules,
        run=run.source,
        data=data.described,
        command=command,
        ranksure_version=version("ranksure"),
    )


def check_place(folder: Path, *, create: bool) -> None:
    """Refuse before the work a folder that ``certificate.json`` could not be written to after it.

    Args:
        folder: where it is to go.
        create: whether a folder that does not exist will be made.

    Raises:
        SettingError: a file of that name that no certificate wrote, or a folder that cannot be written.
    """
    path = folder / NAME
    if not folder.is_dir():
        if folder.exists():
            raise SettingError(f"`out` {folder} is a file; name a folder")
        if not create:
            return  # loading says that there is no such adapter
    if path.exists() and not {"verdict", "schema"} <= _content(path).keys():
        raise SettingError(f"{path} exists and is no certificate: move it away, or name another folder with `out`")
    try:
        try_to_write(folder.resolve())
    except OSError as error:
        raise SettingError(
            f"{folder} cannot be written ({error.strerror or error}): name a folder with `out`"
        ) from None


def refuse_other_loss(folder: Path, kind: Kind) -> None:
    """Keep a certificate of another loss, as it is of another objective.

    Raises:
        SettingError: ``folder`` holds one.
    """
    path = folder / NAME
    known = _content(path).get("loss_kind")
    if known not in (None, kind):
        raise SettingError(
            f"{path} is a certificate with the {known} loss, not {kind}: name another folder with `out`, or move it "
            "away if it was made by mistake"
        )


def earlier(folder: Path) -> list[RunCertificate]:
    """The certificate that is there already, if it can be read."""
    try:
        return [read(folder / NAME, RunCertificate)]
    except DataError:
        return []


def write_record(folder: Path, found: RunCertificate) -> Path:
    """Write ``certificate.json`` into ``folder``, replacing an earlier one.

    Raises:
        SettingError: it cannot be written; an earlier one is then left as it was.
    """
    path = folder / NAME
    write_or_refuse(path, encoded(found.to_json()), SettingError)
    return path


def _content(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
