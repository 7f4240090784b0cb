"""Four members on one small problem: replicas stay equal, and the loss falls as far as it must."""

import torch

from optimizer import DisTrO

ROUNDS, MEMBERS, LR = 120, 4, 0.01


def train(overlap: bool, lookahead: bool) -> float:
    """Final loss of a two-layer network that learns another one, each member on its own data."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(40, 72), torch.nn.Tanh(), torch.nn.Linear(72, 10))
    models = []
    for _ in range(MEMBERS):
        torch.manual_seed(1)
        models.append(torch.nn.Sequential(torch.nn.Linear(40, 72), torch.nn.Tanh(), torch.nn.Linear(72, 10)))
    optimizers = [
        DisTrO(m.named_parameters(), lr=LR, decay=0.9, topk=64, window=2, lookahead=lookahead) for m in models
    ]
    generator = torch.Generator().manual_seed(2)
    travelling: tuple[int, list[bytes]] | None = None

    def deliver(round: int, blobs: list[bytes]) -> None:
        for member, optimizer in enumerate(optimizers):
            optimizer.apply(blobs[member:] + blobs[:member], lr=LR * (1 - round / ROUNDS))

    for round in range(ROUNDS):
        blobs = []
        for member, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x = torch.randn(64, 40, generator=generator)
            optimizer.set_lr(LR * (1 - round / ROUNDS))
            with optimizer.lookahead():
                torch.nn.functional.mse_loss(model(x), teacher(x).detach()).backward()
            blobs.append(optimizer.encode(run=bytes(32), round=round, member=member))
        if not overlap:
            deliver(round, blobs)
            continue
        if travelling is not None:
            deliver(*travelling)
        travelling = (round, blobs)
    assert len({optimizer.fingerprint() for optimizer in optimizers}) == 1
    x = torch.randn(1024, 40, generator=generator)
    with torch.no_grad():
        return float(torch.nn.functional.mse_loss(models[0](x), teacher(x)))


def test_lookahead_makes_up_for_part_of_what_overlap_costs() -> None:
    waiting, overlapped, blind = train(False, True), train(True, True), train(True, False)
    print(f"loss: waiting {waiting:.5f}, overlapped with lookahead {overlapped:.5f}, without {blind:.5f}")
    assert waiting < 0.003  # 0.3 at the start
    assert overlapped < 1.7 * waiting
    assert overlapped < 0.85 * blind


def test_step_trains_alone() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = DisTrO([("w", weight)], lr=0.05, topk=128, decay=0.9)
    losses = [optimizer.step(lambda: _square(weight)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]


def _square(weight: torch.nn.Parameter) -> float:
    loss = (weight**2).mean()
    loss.backward()
    return loss.item()
