import json

import pytest

from fastserve_mega.models.architecture import load_architecture


@pytest.fixture
def load(tmp_path):
    def load_config(config, generation=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return load_architecture(tmp_path)

    return load_config
