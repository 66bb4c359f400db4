"""A fixture that writes a file of presets and loads it."""

import pytest
import yaml

from rl import load_preset


@pytest.fixture
def load(tmp_path):
    """Return a function from YAML of one environment's entry to the preset."""

    def load(entry, algorithm="trpo", env_id="CartPole-v1"):
        file = tmp_path / "my.yml"
        file.write_text(yaml.safe_dump({env_id: entry}) if isinstance(entry, dict) else entry)
        return load_preset(algorithm, env_id, file)

    return load
