"""Where recipes are read from."""

import pytest


@pytest.fixture
def folder(tmp_path):
    """A recipe's folder: a reward function, a link out of it, and nothing of kltune in the current folder."""
    home = tmp_path / "project"
    home.mkdir()
    (home / "rewards.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    (tmp_path / "rewards.py").write_text("")
    (home / "linked.py").symlink_to(tmp_path / "rewards.py")
    return home
