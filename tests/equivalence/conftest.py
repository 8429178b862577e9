"""A fresh tiny model for every test: tests add adapters and change weights."""

from pathlib import Path

import pytest
import torch
from tiny_models import open_encoder, open_model

from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model


@pytest.fixture(autouse=True)
def one_thread(seeded: None) -> None:
    """A second thread gains nothing on so small a network, and on a busy machine every product waits for it."""
    torch.set_num_threads(1)


@pytest.fixture
def model(tiny_base: Path) -> Model:
    return open_model(tiny_base)


@pytest.fixture(scope="session")
def encoder(tiny_base: Path) -> Encoder:
    return open_encoder(tiny_base)
