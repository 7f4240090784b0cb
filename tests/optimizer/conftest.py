"""Small models whose tensors exercise every way a layout cuts them."""

from collections.abc import Callable, Iterator

import pytest
import torch

Shapes = list[tuple[str, tuple[int, ...]]]
SHAPES: Shapes = [
    ("ragged", (70, 130)),
    ("square", (64, 128)),
    ("conv", (3, 5, 7)),
    ("long", (5000,)),
    ("bias", (70,)),
    ("norm", (4000,)),
    ("scalar", ()),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shapes() -> Shapes:
    return list(SHAPES)


@pytest.fixture
def make() -> Callable[..., list[tuple[str, torch.nn.Parameter]]]:
    """Named parameters of SHAPES with seeded weights."""

    def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
        generator = torch.Generator().manual_seed(seed)
        return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))) for name, shape in SHAPES]

    return build
