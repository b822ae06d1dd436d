"""Which token is whose: networks of every layout against a row alone, in whatever batches the rows come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from ranksure.capture import Captured, capture
from ranksure.errors import CaptureError
from ranksure.losses import get_loss
from ranksure.network.batches import Batches
from ranksure.network.targets import base_layer
from ranksure.operators.dense import DenseOperator
from tests.helpers import generator_of, randn

CONTRASTS = get_loss("cross-entropy").contrasts(3)
Read = Callable[["Layers", Tensor], Tensor]


class Layers(nn.Module):
    """Two linear maps and a head; ``read`` says in which layout they see ``(rows, length, 4)``."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.positions, self.norm = nn.Embedding(16, 4), nn.BatchNorm1d(4, track_running_stats=False)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.read = read
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)

    def both(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()


def sequence_first(s: Layers, x: Tensor) -> Tensor:
    return s.head(s.both(x.transpose(0, 1))[0] + s.both(x.transpose(0, 1).sin()).mean(0))


def flattened(s: Layers, x: Tensor) -> Tensor:
    return s.head(s.both(x.reshape(-1, 4)).view(x.shape).square().mean(1))


def flattened_sequence_first(s: Layers, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return s.head(s.both(y.reshape(-1, 4)).view(y.shape).square().mean(0))


def mixed(s: Layers, x: Tensor) -> Tensor:
    h = s.first(x).tanh().transpose(0, 1)  # (rows, length) here, (length, rows) there
    return s.head(s.second(h).tanh()[0])


def windows(s: Layers, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.repeat(1, 2, 1).view(b, 2, n, 4)
    inner = s.both(y.permute(1, 0, 2, 3))  # (windows, rows, length)
    outer = s.both(y.permute(1, 0, 2, 3).reshape(2 * b, n, 4).sin()).view(2, b, n, 4)  # flattened, window first
    return s.head((inner * outer).mean((0, 2)) + s.both(y.view(2 * b, n, 4).cos()).view(b, -1, 4).mean(1))


def by_turns(s: Layers, x: Tensor) -> Tensor:
    h = x
    for _ in range(2):  # each module twice, in two layouts
        h = s.both(h).transpose(0, 1)
    return s.head(h.mean(1))


def layers_over_columns(s: Layers, x: Tensor) -> Tensor:
    """A matrix product over the places, so that the features' dimension is a leading one."""
    y = s.both(x).transpose(1, 2)[..., :1] * x.mean(1)[:, :, None]
    return s.head(y.mean(2))


RECOGNISED = [
    sequence_first, flattened, flattened_sequence_first, mixed, windows, by_turns, layers_over_columns,
]  # fmt: skip


def broadcast_positions(s: Layers, x: Tensor) -> Tensor:
    return s.head((s.both(x) + s.positions(torch.arange(x.shape[1])[None]) * x).sin().mean(1))


def shared_relative_positions(s: Layers, x: Tensor) -> Tensor:
    """As DeBERTa's: the projection of the positions is that of the content, and the positions are all rows'."""
    return s.head((s.both(x) * s.both(s.positions(torch.arange(x.shape[1])))).mean(1))


def routed(s: Layers, x: Tensor) -> Tensor:
    """Tokens of all rows are gathered by expert; some expert may get none of a row."""
    flat = x.reshape(-1, 4)
    to = (flat[:, 0] > 0).long() + (flat[:, 1] > 0).long()
    out = torch.zeros_like(flat)
    for index, expert in enumerate(s.experts):
        if bool((to == index).any()):
            out = out.index_put((to == index,), expert(flat[to == index]))
    return s.head((s.both(x) + out.view(x.shape).tanh()).mean(1))


def ragged(s: Layers, x: Tensor) -> Tensor:
    keep = x[..., 0] > -1
    out = torch.zeros_like(x)
    out[keep] = s.both(x[keep])
    return s.head(out.mean(1))


ALONE = [broadcast_positions, shared_relative_positions, routed, ragged]


def batch_statistics(s: Layers, x: Tensor) -> Tensor:
    return s.head(s.norm(s.both(x).mean(1)))


def capacity(s: Layers, x: Tensor) -> Tensor:
    """An expert takes five tokens; those that come later are dropped."""
    flat = s.both(x).reshape(-1, 4)
    return s.head((flat * (torch.arange(len(flat)) < 5)[:, None]).view(x.shape).mean(1))


def centred(s: Layers, x: Tensor) -> Tensor:
    h = s.both(x)
    return s.head((h - h.mean(0, keepdim=True)).tanh().mean(1))


def exchanged(s: Layers, x: Tensor) -> Tensor:
    return s.head(s.both(x).mean(1)).roll(1, 0)


REFUSED = [batch_statistics, capacity, centred, exchanged]


def targets_of(model: Layers, read: Read) -> dict[str, nn.Module]:
    names = ["first", "second"]
    names += ["positions"] * (read is broadcast_positions) + [f"experts.{i}" for i in range(3)] * (read is routed)
    return {name: model.get_submodule(name) for name in names}


def autograd(model: nn.Module, targets: dict[str, nn.Module], rows: Tensor) -> dict[str, Tensor]:
    """``(N, C, m, n)`` by automatic differentiation of the weights, one row at a time."""
    weights = [base_layer(module).weight for module in targets.values()]
    out: dict[str, list[Tensor]] = {name: [] for name in targets}
    for i in range(len(rows)):
        z = model(rows[i : i + 1])[0] @ CONTRASTS
        for c in range(len(z)):
            grads = torch.autograd.grad(z[c], weights, retain_graph=True, materialize_grads=True)
            for (name, module), grad in zip(targets.items(), grads, strict=True):
                out[name].append(grad.T if isinstance(module, nn.Embedding) else grad)
    return {name: torch.stack(grads).unflatten(0, (len(rows), -1)) for name, grads in out.items()}


def captured(model: nn.Module, targets: dict[str, nn.Module], rows: Tensor, sizes: Sequence[int]) -> Captured:
    found = capture(model, [{"x": part} for part in rows.split(list(sizes))], targets, CONTRASTS, dtype=torch.float64)
    expected = autograd(model, targets, rows)
    for name, dense in DenseOperator.from_operator(found.operator).jacobians().items():
        torch.testing.assert_close(dense, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in rows])
    torch.testing.assert_close(found.base_logits, alone, rtol=1e-10, atol=1e-12)
    return found


SIZES = [(6,), (1, 5), (3, 3), (4, 2), (1,) * 6]


@pytest.mark.parametrize("read", RECOGNISED, ids=lambda read: read.__name__)
@pytest.mark.parametrize("length", [3, 4, 6])  # as long as a batch, or as the rows that are looked at
def test_the_batch_is_found_in_every_layout(read: Read, length: int) -> None:
    model = Layers(read)
    rows = randn(6, length, 4, generator=generator_of(length))
    for sizes in SIZES:
        assert captured(model, targets_of(model, read), rows, sizes).notes == []


@pytest.mark.parametrize("read", ALONE, ids=lambda read: read.__name__)
@pytest.mark.parametrize("length", [4, 5])
def test_rows_run_alone_where_a_weight_acts_on_all_of_them(read: Read, length: int) -> None:
    model = Layers(read)
    rows = randn(6, length, 4, generator=generator_of(length))
    for sizes in SIZES:
        notes = captured(model, targets_of(model, read), rows, sizes).notes
        assert ("ran alone" in " ".join(notes)) == (max(sizes) > 1)


@pytest.mark.parametrize("read", REFUSED, ids=lambda read: read.__name__)
@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 5)])
def test_rows_whose_logits_depend_on_others_are_refused(read: Read, sizes: Sequence[int]) -> None:
    model = Layers(read)
    rows = randn(6, 4, 4, generator=generator_of(1))
    with pytest.raises(CaptureError, match=r"samples interact|does not run row") as caught:
        captured(model, targets_of(model, read), rows, sizes)
    assert "\n" not in str(caught.value)


def test_a_module_that_the_looked_at_rows_do_not_use_is_not_guessed() -> None:
    """Sequence first, and felt by one row of twenty only, which is not one of the four."""

    def gated(s: Layers, x: Tensor) -> Tensor:
        gate = (x[:, 0, 0] > 5).to(x)
        return s.head(x.mean(1) + gate[:, None] * s.both(x.transpose(0, 1)).mean(0))

    for chosen in range(20):
        model = Layers(gated)
        rows = randn(20, 4, 4, generator=generator_of(0)).clamp(max=4)
        rows[chosen, 0, 0] = 6
        captured(model, targets_of(model, gated), rows, (20,))


def test_a_use_that_comes_and_goes_with_the_batch() -> None:
    def sometimes(s: Layers, x: Tensor) -> Tensor:
        h = s.both(x)
        return s.head((h + s.both(h) if bool((x > 2.5).any()) else h).mean(1))

    model = Layers(sometimes)
    rows = randn(6, 4, 4, generator=generator_of(0)).clamp(-2, 2)
    captured(model, targets_of(model, sometimes), rows, (3, 3))
    rows[2, 0, 0] = 3  # now its neighbours see the second use as well
    with pytest.raises(CaptureError, match="samples interact"):
        captured(model, targets_of(model, sometimes), rows, (3, 3))


def test_another_number_of_logits_than_rows() -> None:
    model = Layers(lambda s, x: s.head(s.both(x).mean(1))[:1])
    with pytest.raises(CaptureError, match="1 rows of logits for a batch of 3"):
        captured(model, targets_of(model, flattened), randn(3, 4, 4, generator=generator_of(0)), (3,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_a_mixture_of_rows(dtype: torch.dtype) -> None:
    """A deep network, whose rounding grows: its rows are told apart nevertheless."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0)  # sequence first
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x.transpose(0, 1)).mean(0))

    model = Deep().to(dtype).eval()
    targets = {n: m for n, m in model.named_modules() if n.endswith(("linear1", "linear2"))}
    rows = randn(9, 7, 32, generator=generator_of(0)).to(dtype)
    found = capture(model, [{"x": rows}], targets, CONTRASTS)
    assert found.notes == [] and found.operator.n_samples == 9


# ---- rows that are collated here


def test_batches_by_length_and_by_own_length() -> None:
    rows = [{"input_ids": [i + 1] * n} for i, n in enumerate((3, 5, 3, 2, 5, 3, 3))]

    def collate(part: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in part)
        return {"ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in part])}

    plain = Batches(rows, 3, collate)
    assert plain.sizes == [3, 3, 1] == [len(batch["ids"]) for batch in plain]
    assert plain[0]["ids"].tolist() == [[1, 1, 1, 0, 0], [2] * 5, [3, 3, 3, 0, 0]] and len(plain[1:]) == 2
    assert plain[-1]["ids"].tolist() == [[7, 7, 7]]
    own = Batches(rows, 3, collate, own_length=True, by_length=True)
    assert [batch["ids"][:, 0].tolist() for batch in own] == [[2, 5], [1, 3, 6], [7], [4]]
    assert all(bool((batch["ids"] > 0).all()) for batch in own)
    (batch, numbers), (_, others) = list(own.together([0, 2]))
    assert (numbers, others) == ([0, 1], [2, 3]) and batch["ids"].shape == (2, 5)  # each beside one of its length
    with pytest.raises(IndexError):
        plain[3]
