"""What a reward model costs in memory beside a policy, on the policy's own weights and on weights of its own.

    python scripts/reward_memory.py [MODEL...]

A model is a folder; "llama" is a random one, 256 wide, 6 layers, 32,000 tokens. Each row is measured in a process of
its own: policy with value function first, then the reward model.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

from bench_parts import in_own_process, memory_mb, random_llama


def save_fresh_reward_model(model: str, folder: Path) -> None:
    """An untrained reward model as ``kltune reward`` saves one."""
    import torch

    from kltune.lm.model.opening import load_policy
    from kltune.lm.rewards.reward_model import RewardModel
    from kltune.recipe import LoraSection, ModelSection

    policy = load_policy(ModelSection(path=model), LoraSection(), device=torch.device("cpu"))
    reward = RewardModel(policy)
    folder.mkdir()
    reward.save(folder)
    told = {"probe": reward.probe(), "reads_text": True}
    record = {"stage": "reward", "reference": policy.fingerprint.as_dict(), "reward": told}
    (folder / "kltune.json").write_text(json.dumps(record), encoding="utf-8")


def row(model: str, folder: Path, share: bool) -> dict[str, float]:
    """Parameters and resident memory before, and what opening the reward model adds to both."""
    import torch

    from kltune.lm.model.opening import load_policy
    from kltune.lm.rewards.reward_model import open_reward_model
    from kltune.recipe import LoraSection, ModelSection

    policy = load_policy(ModelSection(path=model), LoraSection(), device=torch.device("cpu"))
    policy.add_value_function(LoraSection())
    gc.collect()
    before, held = memory_mb("VmRSS"), sum(tensor.numel() for tensor in policy.model.parameters())
    reader, _, _ = open_reward_model(folder, policy if share else None, policy.device)
    gc.collect()
    networks = {id(one): one for one in (policy.model, reader.model.policy.model)}.values()
    added = sum(tensor.numel() for network in networks for tensor in network.parameters()) - held
    return {"held": held / 1e6, "added": added / 1e6, "mb": memory_mb("VmRSS") - before}


def main() -> None:
    """Measure each model and print a table."""
    print(f"{'model':<14}{'weights of':<14}{'policy, reference, values':>27}{'reward adds':>13}{'resident memory':>17}")
    for name in sys.argv[1:] or ["llama"]:
        with tempfile.TemporaryDirectory() as scratch:
            sizes = {"hidden": 256, "layers": 6, "vocabulary": 32_000}
            model = str(random_llama(Path(scratch) / "llama", **sizes)) if name == "llama" else name
            folder = Path(scratch) / "reward"
            in_own_process(save_fresh_reward_model, model, folder)
            for share in (True, False):
                found = in_own_process(row, model, folder, share)
                print(f"{Path(model).name:<14}{'the policy' if share else 'its own':<14}{found['held']:>25.2f} M"
                      f"{found['added']:>11.2f} M{found['mb']:>14.1f} MB")


if __name__ == "__main__":
    main()
