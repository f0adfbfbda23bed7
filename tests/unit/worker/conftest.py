"""What several files ask for: models, and logits."""

from __future__ import annotations

import pytest
import torch
from sampled import VOCABULARY
from tiny_models import make_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Family → (directory, transformers model), made when first asked for."""
    models = {}

    def get(name):
        if name not in models:
            directory = tmp_path_factory.mktemp(name)
            models[name] = (directory, make_model(name, directory))
        return models[name]

    return get


@pytest.fixture(scope="module")
def logits():
    """Not to be changed."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(VOCABULARY, generator=generator) * 2
