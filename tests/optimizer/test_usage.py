"""As a torch optimizer: groups, schedulers, accumulation, mixed precision, compiled models; and what it reports."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from optimizer import DisTrO
from optimizer.blocks import gather
from optimizer.errors import NonFiniteGradient, OptimizerError
from optimizer.geometry import Geometry
from optimizer.transform import butterflies

Named = list[tuple[str, torch.nn.Parameter]]
Make = Callable[..., Named]


class Net(torch.nn.Module):
    """Tied weights, a frozen vector, dimensions that do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 70)
        self.norm = torch.nn.LayerNorm(70)
        self.head = torch.nn.Linear(70, 50, bias=False)
        self.head.weight = self.embed.weight
        self.scale = torch.nn.Parameter(torch.ones(70), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)) * self.scale)


def loss(model: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Sequences in which every token is followed by the next one."""
    starts = torch.randint(50, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(9)) % 50


def bits(rate: float) -> int:
    return int(np.float32(rate).view(np.uint32))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_groups_have_rates_and_weight_decay_of_their_own() -> None:
    """A step moves the weights of each group by its own rate, small vectors in one block included."""
    named = {name: torch.nn.Parameter(torch.full((70,), 2.0)) for name in ("a", "b", "c")}
    named["w"] = torch.nn.Parameter(torch.full((70, 66), 2.0))
    slow = {"params": [("a", named["a"]), ("w", named["w"])], "lr": 0.125, "weight_decay": 0.5}
    optimizer = DisTrO([slow, {"params": [("b", named["b"]), ("c", named["c"])]}], lr=0.5, topk=64)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.apply([optimizer.encode()])
    for name, lr, share in (("a", 0.125, 0.9375), ("w", 0.125, 0.9375), ("b", 0.5, 1.0), ("c", 0.5, 1.0)):
        moved = (named[name].detach() - 2.0 * share).abs()
        assert set(moved.flatten().tolist()) <= {0.0, lr}, name
        assert (moved > 0).any()
    assert optimizer.lr == [0.125, 0.5]
    optimizer.set_lr([0.25, 1.0])
    assert optimizer.lr == [0.25, 1.0]
    with pytest.raises(ValueError, match="3 learning rates for 2 parameter groups"):
        optimizer.apply([], lr=[0.1, 0.1, 0.1])
    with pytest.raises(OptimizerError, match="the layout is fixed"):
        optimizer.add_param_group({"params": [("x", torch.nn.Parameter(torch.zeros(2)))]})


def test_one_mistake_at_a_time_and_nothing_is_lost() -> None:
    """A step inside lookahead, bytes instead of a list, a model converted on the way: refused with nothing changed."""
    model = Net()
    optimizer = DisTrO(model.named_parameters(), lr=0.01, topk=8)
    loss(model, tokens(4)).backward()
    before = optimizer.state_dict()["momentum"].clone()
    with optimizer.lookahead(), pytest.raises(OptimizerError, match="cannot step inside lookahead"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"write apply\(\[blob\]\)"):
        optimizer.apply(b"update")
    gradient = model.norm.weight.grad
    model.norm.half()
    with pytest.raises(OptimizerError, match=r"norm\.bias was torch\.float32 .* now load a checkpoint"):
        optimizer.encode()
    assert optimizer.travelling == {}
    assert gradient is not None
    assert torch.equal(optimizer.state_dict()["momentum"], before)


def test_a_group_that_rests_does_not_stop_the_others() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    groups = [{"params": [("a", a)], "lr": 0.0}, {"params": [("b", b)], "lr": 0.5}]
    optimizer = DisTrO(groups, lr=1.0, topk=8)
    a.grad, b.grad = torch.zeros(64, 64), torch.ones(64, 64)
    optimizer.apply([optimizer.encode()])
    assert not a.any()
    assert (b <= 0).all()
    assert b.min() == -0.5


def test_rates_and_weight_decay_are_numbers_or_bit_patterns() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    group = {"params": [("w", weight)], "lr": bits(0.125), "weight_decay": np.int64(bits(0.5))}
    optimizer = DisTrO([group], lr=1.0, topk=8)
    assert optimizer.lr == [0.125]
    optimizer.apply([optimizer.encode()])
    assert set(weight.detach().flatten().tolist()) <= {0.9375 - 0.125, 0.9375, 0.9375 + 0.125}
    optimizer.set_lr(np.float32(0.25))
    assert optimizer.lr == [0.25]
    with pytest.raises(ValueError, match="a weight decay is an fp32 bit pattern"):
        DisTrO([{"params": [("w", weight)], "weight_decay": "0.1"}], lr=1.0)
    with pytest.raises(ValueError, match=r"weight decay 0\.5 at learning rate 4\.0 takes more than all"):
        optimizer.apply([optimizer.encode()], lr=4.0)


def test_groups_do_not_change_the_layout_or_the_bytes() -> None:
    """The layout follows from names and shapes; how a site groups its parameters is its own affair."""
    one, two = Net(), Net()
    vectors = [(n, p) for n, p in two.named_parameters() if p.ndim < 2]
    matrices = [(n, p) for n, p in two.named_parameters() if p.ndim >= 2]
    a = DisTrO(one.named_parameters(), lr=0.01, topk=16)
    b = DisTrO([{"params": vectors}, {"params": matrices}], lr=0.01, topk=16)
    assert a.layout == b.layout
    for model in (one, two):
        loss(model, tokens(4)).backward()
    assert a.encode() == b.encode()


def test_schedulers_of_torch_set_the_rate() -> None:
    model = Net()
    optimizer = DisTrO(model.named_parameters(), lr=0.08, topk=64)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for expected in (0.08, 0.04, 0.02):
        assert optimizer.lr == [pytest.approx(expected)]
        before = model.norm.bias.detach().clone()
        loss(model, tokens(4)).backward()
        optimizer.step()
        moved = (model.norm.bias.detach() - before).abs()
        assert moved.max() == pytest.approx(expected, rel=1e-5)
        scheduler.step()


@pytest.mark.parametrize("missing", ["parameters", "dict"])
def test_parameters_without_names_are_refused(missing: str) -> None:
    model = Net()
    given = list(model.parameters()) if missing == "parameters" else [{"params": list(model.parameters())}]
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        DisTrO(given, lr=0.01)


def test_tied_weights_count_once_and_frozen_ones_stay() -> None:
    model = Net()
    optimizer = DisTrO(model.named_parameters(), lr=0.05, topk=64)
    assert [name for name, _ in optimizer.shapes] == ["embed.weight", "norm.bias", "norm.weight"]
    optimizer.step(lambda: _backward(model, 4))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.scale, torch.ones(70))


def _backward(model: torch.nn.Module, count: int) -> float:
    value = loss(model, tokens(count))
    value.backward()
    return value.item()


def test_accumulated_gradients_are_one_gradient() -> None:
    whole, parts = Net(), Net()
    a, b = (DisTrO(m.named_parameters(), lr=0.01, topk=8) for m in (whole, parts))
    loss(whole, tokens(8)).backward()
    for part in tokens(8).split(2):
        (loss(parts, part) / 4).backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
            q.grad.copy_(p.grad)
    assert a.encode() == b.encode()


def test_a_gradient_scaler_unscales_and_skips() -> None:
    """torch.amp: scaled fp16-style gradients step as unscaled ones do, and an overflow leaves the round out."""
    plain, scaled = Net(), Net()
    a, b = (DisTrO(m.named_parameters(), lr=0.01, topk=8) for m in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss(plain, tokens(4)).backward()
    a.step()
    scaler.scale(loss(scaled, tokens(4))).backward()
    scaler.step(b)
    scaler.update()
    assert torch.equal(weights(plain), weights(scaled))
    before = weights(scaled)
    loss(scaled, tokens(4)).backward()
    scaled.norm.weight.grad[3] = float("inf")
    with pytest.raises(NonFiniteGradient, match=r"norm\.weight"):
        b.encode()
    scaler.scale(torch.tensor(1.0))
    scaler.unscale_(b)
    scaler.step(b)
    scaler.update()
    assert torch.equal(weights(scaled), before)


def test_autocast_does_not_reach_the_votes() -> None:
    results = []
    for enabled in (False, True):
        model = Net()
        optimizer = DisTrO(model.named_parameters(), lr=0.01, topk=8, engine="torch")
        loss(model, tokens(4)).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.apply([optimizer.encode()])
        results.append((optimizer.fingerprint(), weights(model).numpy().tobytes()))
    assert results[0] == results[1]


def test_a_compiled_model_sees_the_lookahead_and_learns() -> None:
    """The compiled graph reads the same memory: it is traced once, and its gradients are those of the eager model."""
    eager, other = Net(), Net()
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(other, backend=backend)
    a, b = (DisTrO(m.named_parameters(), lr=0.01, topk=64, decay=0.9) for m in (eager, other))
    losses = []
    for round in range(6):
        for model, optimizer in ((eager, a), (compiled, b)):
            with optimizer.lookahead():
                value = loss(model, tokens(8, seed=round))
                value.backward()
            losses.append(value.item())
            optimizer.apply([optimizer.encode()])
    assert len(traced) == 1
    assert losses[::2] == pytest.approx(losses[1::2])
    assert losses[-1] < losses[0]
    assert torch.equal(weights(eager), weights(other))


def chosen_from(optimizer: DisTrO, named: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    """The momentum that the next update is chosen from, of which it is then taken out."""
    (slab,) = Geometry.build(optimizer.layout, optimizer.layout.blocks).slabs
    gradients = [named[placement.name].grad for placement in optimizer.layout.placements]
    coefficients = butterflies(gather(slab, gradients, torch.device("cpu"))) / 64
    return (optimizer.decay * optimizer.state_dict()["momentum"] + optimizer.lr[0] * coefficients).double()


def test_report(make: Make) -> None:
    """Three members with one gradient, which turns round in the second of two rounds."""
    replicas = [make() for _ in range(3)]
    members = [DisTrO(named, lr=0.01, topk=32, decay=0.5) for named in replicas]
    empty = members[0].report()
    assert (empty.momentum_norm, empty.energy_sent, empty.agreement, empty.flips) == (0.0, None, None, None)
    for round, factor in enumerate((1.0, -3.0)):
        for named in replicas:
            generator = torch.Generator().manual_seed(7)
            for _, p in named:
                p.grad = factor * torch.randn(p.shape, generator=generator)
        momentum = chosen_from(members[0], dict(replicas[0]))
        blobs = [member.encode(round=round, member=number) for number, member in enumerate(members)]
        members[0].apply(blobs)
    report = members[0].report()
    assert report.sampled == members[0].layout.blocks
    assert report.agreement == 1.0, "all three members sent the same votes"
    assert report.flips is not None
    assert report.flips > 0.8, "the second gradient points the other way"
    assert report.lost == 0.0
    assert report.ties is not None
    assert 0.0 < report.ties < 0.5
    assert report.momentum_norm == pytest.approx(float(momentum.norm()), rel=1e-5)
    kept = torch.topk(momentum.abs(), 32, dim=1).values.square().sum()
    assert report.energy_sent == pytest.approx(float(kept / momentum.square().sum()), rel=1e-5)
    assert report.seconds.keys() >= {"gather", "encode", "assemble", "check", "apply"}
    assert members[0].report().seconds == {}


def test_report_notices_steps_below_the_resolution(make: Make) -> None:
    named = make()
    with torch.no_grad():
        for _, p in named:
            p.fill_(1024.0)
    optimizer = DisTrO(named, lr=1e-6, topk=32)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.apply([optimizer.encode()])
    report = optimizer.report()
    assert report.lost is not None
    assert report.ties is not None
    assert report.lost == pytest.approx(1.0 - report.ties)
    assert np.isfinite(report.momentum_norm)
