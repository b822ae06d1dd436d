"""``ranksure.grow()``: new directions for the modules whose rank is the limit, the function unchanged.

A new column is ``u = 0``, ``v = sqrt(t) q`` with ``(p, q)`` a top singular pair of the gradient outside the present
factors' spaces, as LoRA starts its own columns: the update is the same, but the gradient of ``u``
is ``sqrt(t) sigma p``, so the first step goes along ``-p``. (With ``v = 0`` as well it would be a saddle that no
training leaves.) ``t`` is a tenth of the update's mean singular value: on the scale of the present columns, so that the
new one has not far to grow, and small enough to add little to the trained penalty. Derived in
docs/grow-and-compress.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter, read_adapter
from ranksure.adapters.merging import merged
from ranksure.errors import AdapterError, SettingError
from ranksure.factors import Factors, ranks_of
from ranksure.losses import Kind
from ranksure.network.batches import held
from ranksure.network.gradient import Progress, gradient_pass
from ranksure.network.logits import Batch
from ranksure.records.certificate import RunCertificate
from ranksure.records.change import GrownModule, GrowRecord
from ranksure.records.record import plain
from ranksure.relinearised import Examiner
from ranksure.runs.certificate.certify import certify_adapter
from ranksure.runs.certificate.settings import CertifySettings
from ranksure.runs.resizing.resized import Resized
from ranksure.spectral import outside_pairs

MOST_NEW = 8
"""Most directions added to a module."""

START = 0.1
"""Squared size of the steepest new column, as a share of the mean singular value of the update."""


@dataclass(frozen=True)
class Growth(Resized):
    """New directions for an adapter; nothing is written yet, and the model is as it was.

    Attributes:
        certificate: why.
        factors: ``u`` (m, r) and ``v`` (n, r) of every module, float64: the present columns, then the new ones.
        added: new columns by module that has any.
        slopes: decrease of the objective per unit of each new direction, by module, largest first.
        sizes: ``t``, the squared norm of each new column of ``v``, by module.
        forced: grown although the verdict was not rank-bound.
    """

    record: ClassVar[str] = "grow.json"

    certificate: RunCertificate
    factors: Factors
    added: dict[str, int]
    slopes: dict[str, list[float]]
    sizes: dict[str, list[float]]
    forced: bool
    loss: Kind | None = None

    @property
    def penalty_added(self) -> float:
        """What the new columns add to the trained penalty ``sum_j (lambda_j / 2)(||u||^2 + ||v||^2)``."""
        lams = {name: state.lam or 0.0 for name, state in self.certificate.modules.items()}
        return sum(0.5 * lams[name] * sum(sizes) for name, sizes in self.sizes.items())

    def to_json(self, **more: Any) -> dict[str, Any]:
        """What ``grow.json`` holds."""
        ranks = ranks_of(self.factors)
        record = GrowRecord(
            verdict=self.certificate.verdict,
            forced=self.forced,
            modules={
                name: GrownModule(
                    rank_before=rank - self.added.get(name, 0),
                    rank_after=rank,
                    slopes=self.slopes.get(name, []),
                    sizes=self.sizes.get(name, []),
                )
                for name, rank in ranks.items()
            },
            rank_before=sum(ranks.values()) - sum(self.added.values()),
            rank_after=sum(ranks.values()),
            penalty_added=self.penalty_added,
            certificate=self.certificate,
            notes=self.uneven,
            **more,
        )
        return {**plain(record), "certificate": self.certificate.to_json()}

    def told(self) -> dict[str, Any]:
        """As :class:`Resized`."""
        text = (
            "Columns were added where the rank was the limit. They do not change a prediction: train on to use them, "
            "with a new optimizer (the state of the old one does not fit)."
        )
        return {"adapter": self.certificate.adapter, "title": "Grown", "text": text}


def grow(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    most_new: int = MOST_NEW,
    force: bool = False,
    certificate: RunCertificate | None = None,
    progress: Progress = lambda done: None,
    **settings: Any,
) -> Growth:
    """Find the directions that a rank-bound LoRA run is missing.

    Certifies the run (one gradient pass, and the probes), then takes the gradients of the rank-bound modules again,
    one more pass: a certificate keeps the best direction of each module only.

    Args:
        model: the trained network with its adapter active; it stays as it is.
        batches: all the training data, with ``labels``.
        most_new: most directions for one module; all whose gain is above the tolerance by default, up to 8.
        force: grow whatever the verdict is, where any new direction lowers the objective.
        certificate: the run's certificate at these very weights and settings, if there is one already.
        progress: called after every batch.
        **settings: as for :func:`ranksure.certify`.

    Returns:
        The growth; :meth:`Growth.save` writes it.

    Raises:
        SettingError: a verdict other than rank-bound (the message is the advice), or ``most_new`` below 1.
        AdapterError: nothing to add even with ``force``, or an adapter that cannot be certified.
    """
    chosen = CertifySettings.of("grow", settings)
    if most_new < 1:
        raise SettingError(f"the most new directions per module must be at least 1, not {most_new}")
    read, batches = read_adapter(model, chosen.adapter), held(batches, chosen.stream_rows)
    if certificate is None:
        certificate = certify_adapter(model, read, batches, chosen, progress=progress)
    _check_verdict(certificate, force)
    names = _modules_to_grow(certificate, force)
    missing = Missing(read.factors, most_new)
    pairs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    gradient_pass(
        model,
        batches,
        {name: read.modules[name] for name in names},
        **chosen.of_pass,
        consume=lambda name, gradient: pairs.update({name: missing(name, gradient)}),
        progress=progress,
        around=merged,
    )
    threshold = {name: 0.0 if force else _threshold(certificate, name) for name in names}
    return replace(_grown(read, pairs, certificate, threshold), loss=chosen.loss)


def _check_verdict(certificate: RunCertificate, force: bool) -> None:
    verdict = certificate.verdict
    if verdict == "not-checked":
        raise AdapterError(f"the run cannot be certified, so nothing says where to grow: {certificate.reasons[0]}")
    if verdict != "rank-bound" and not force:
        raise SettingError(
            f"the verdict is {verdict}, not rank-bound. {certificate.advice()[0]} (`force` grows anyway)"
        )


def _modules_to_grow(certificate: RunCertificate, force: bool) -> list[str]:
    names = certificate.rank_bound_modules
    if force or not names:
        names = [name for name, state in certificate.modules.items() if state.slope > 0]
    if not names:
        raise AdapterError("no new direction lowers the objective in any module, to first order: there is none to add")
    return names


def _threshold(certificate: RunCertificate, name: str) -> float:
    """Gradient norm from which a new direction can gain more than the certificate's tolerance."""
    state = certificate.modules[name]
    if state.lam is not None:
        return state.lam / (1 - certificate.tolerance)
    # The ball's gap is at most inner + radius max ||g||; inner + radius sigma above tolerance * objective counts.
    radius, inner = certificate.radius or 0.0, certificate.inner or 0.0
    return max(certificate.tolerance * (certificate.objective or 0.0) - inner, 0.0) / radius if radius > 0 else 0.0


def _grown(
    read: Adapter,
    pairs: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    certificate: RunCertificate,
    threshold: Mapping[str, float],
) -> Growth:
    slopes: dict[str, list[float]] = {}
    columns: dict[str, Tensor] = {}
    for name, (_, sigma, q) in pairs.items():
        lam = certificate.modules[name].lam or 0.0
        keep = (sigma > max(threshold[name], lam)) & (sigma > 1e-12 * certificate.modules[name].gradient_norm)
        if bool(keep.any()):
            slopes[name] = [float(value) - lam for value in sigma[keep]]
            columns[name] = q[:, keep]
    if not columns:
        raise AdapterError("no new direction gains more than the tolerance in any module: there is none to add")
    steepest = max(values[0] for values in slopes.values())
    column = _mean_singular_value(certificate)
    sizes = {name: [START * column * value / steepest for value in values] for name, values in slopes.items()}
    factors: Factors = {}
    for name, (u, v) in read.factors.items():
        if name in columns:
            roots = torch.tensor(sizes[name], dtype=torch.float64).sqrt()
            u = torch.cat([u, u.new_zeros(u.shape[0], len(roots))], 1)
            v = torch.cat([v, columns[name] * roots], 1)
        factors[name] = (u, v)
    added = {name: len(values) for name, values in slopes.items()}
    return Growth(certificate, factors, added, slopes, sizes, certificate.verdict != "rank-bound")


class Missing:
    """Top singular pairs of ``(I - UU^T) g (I - VV^T)``: the directions that the used factors cannot follow.

    Args:
        factors: all of the adapter's (the largest singular value decides what counts as used).
        most: pairs per module.
    """

    def __init__(self, factors: Factors, most: int) -> None:
        self.most, self.examiner = most, Examiner(factors, None)

    def __call__(self, name: str, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one module's gradient of the loss, ``(m, n)``.

        Returns:
            ``p`` (m, k), ``sigma`` (k,) descending, ``q`` (n, k), float64, on the CPU: adding ``-t p_l q_l^T`` lowers
            the loss by ``sigma_l`` per unit of ``t``; the directions are orthogonal to each other and to the used.
        """
        p, s, q = self.examiner.parts[name]
        used = s > self.examiner.threshold
        a, sigma, b = outside_pairs(gradient, p[:, used], q[:, used], self.most)
        return a.cpu(), sigma.cpu(), b.cpu()


def _mean_singular_value(certificate: RunCertificate) -> float:
    """Mean of the update's used singular values, over all modules; one where the update is zero."""
    norm = sum(state.nuclear_norm for state in certificate.modules.values())
    return norm / sum(state.rank_used for state in certificate.modules.values()) if norm > 0 else 1.0
