"""Small models for every room that needs one; heavy imports wait until a test asks."""

import errno
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kltune.lm.model.policy import Policy
    from kltune.recipe import PPORecipe

STORIES = Path(__file__).resolve().parents[1].parent / "shared" / "models" / "stories260K"

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))      # a run's threads are not those of a busy moment
signal.signal(signal.SIGHUP, signal.SIG_DFL)       # under nohup, what tests start would ignore it


RECIPE = """
stage: ppo
model: {path: some/model}
data: {prompts: prompts.jsonl}
reward:
  - {kind: function, path: "rewards.py:score"}
run: {steps: 10, output: out}
"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many kills, exits and the like the tests that passed have made, by what they recorded as properties."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        counts.update({name: count for name, count in report.user_properties if isinstance(count, int)})
    if counts:
        terminalreporter.write_line("survived: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test looks for anything but this machine; one that tries fails, whatever became of the attempt."""
    attempts: list[object] = []

    def is_here(host: object) -> bool:
        return host in (None, "", "localhost", "::1", b"localhost") or str(host).startswith("127.")

    def guarded(name: str, host_of: Callable[..., object]) -> None:
        owner = socket if name == "getaddrinfo" else socket.socket
        plain = getattr(owner, name)

        def attempt(*arguments: object, **keywords: object) -> object:
            host = host_of(*arguments)
            if not is_here(host):
                attempts.append(host)
                raise OSError(errno.ENETUNREACH, f"a test must not reach for {host}")
            return plain(*arguments, **keywords)

        monkeypatch.setattr(owner, name, attempt)

    def peer(sock: socket.socket, address: object) -> object:
        return None if sock.family == socket.AF_UNIX else address[0]

    guarded("connect", peer)
    guarded("connect_ex", peer)
    guarded("getaddrinfo", lambda host, *_: host)
    yield
    assert attempts == []


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """The folder of a 260,000-parameter Llama that tells stories; the test is skipped where it is absent."""
    if not (STORIES / "model.safetensors").is_file():
        pytest.skip("../shared/models/stories260K, beside the repository, is not here")
    return STORIES


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an architecture (``tiny_policies.ARCHITECTURES``) to a folder with a random model and tokenizer.

    The folders are shared by all tests: change a copy, never the folder.
    """
    from tests.tiny_policies import save_tiny_model

    folders: dict[str, Path] = {}

    def folder(architecture: str = "llama") -> Path:
        if architecture not in folders:
            folders[architecture] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
        return folders[architecture]

    return folder


@pytest.fixture
def open_policy(tiny_model: Callable[[str], Path]) -> Callable[..., "Policy"]:
    """A function that opens a policy with a fresh adapter: by architecture, or ``path=`` any model folder.

    Other keywords are keys of the recipe's ``model`` section; ``lora=None`` is full fine-tuning.
    """
    import torch

    from kltune.lm.model.opening import load_policy
    from kltune.recipe import LoraSection, ModelSection

    small = LoraSection(rank=4, alpha=8.0)

    def open_one(architecture: str = "llama", *, lora=small, path=None, **section) -> "Policy":
        torch.manual_seed(0)  # the adapter's first weights
        model = ModelSection(path=str(path or tiny_model(architecture)), **section)
        return load_policy(model, lora, device=torch.device("cpu"))

    return open_one


@pytest.fixture
def policy(open_policy: Callable[..., "Policy"]) -> "Policy":
    """A tiny Llama with a fresh adapter."""
    return open_policy()


@pytest.fixture
def trained_policy(policy: "Policy") -> "Policy":
    """A tiny Llama whose adapter holds random numbers: far from its reference."""
    from tests.tiny_policies import randomize

    randomize(policy.trainable_parameters())
    return policy


@pytest.fixture
def tiny_lm_policy(tmp_path: Path, open_policy: Callable[..., "Policy"]) -> "Policy":
    """TinyLM of tests/oracles.py as kltune opens it: ``tiny_policy_logits`` against the reference ρ.

    The adapter sits on the head and holds the difference of the two tables exactly.
    """
    import torch

    from kltune.recipe import LoraSection
    from tests.oracles import save_tiny_lm, tiny_policy_logits, tiny_reference_logits

    folder = save_tiny_lm(tmp_path / "tiny_lm")
    policy = open_policy(path=folder, lora=LoraSection(rank=3, alpha=3.0, targets=("lm_head",)))
    tensors = {name.rpartition("lora_")[2][0]: tensor for name, tensor in policy.trainable_parameters().items()}
    with torch.no_grad():
        tensors["A"].copy_((tiny_policy_logits() - tiny_reference_logits()).T)
        tensors["B"].zero_()[:3].copy_(torch.eye(3))
    return policy


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., "PPORecipe"]:
    """A function from overrides to a recipe whose output is ``tmp_path/out``."""
    from kltune.recipe import load_recipe

    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "once"}\n')
    (folder / "rewards.py").write_text("def score(prompts, responses):\n    return [0.0] * len(prompts)\n")
    (folder / "ppo.yaml").write_text(RECIPE)

    def make(*overrides: str, output: str = "out") -> "PPORecipe":
        return load_recipe(folder / "ppo.yaml", overrides, output=str(tmp_path / output))

    return make
