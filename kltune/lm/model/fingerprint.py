"""Which reference a number belongs to: its weights, settings, tokenizer and ends, and what it says to a few tokens."""

import hashlib
import json
import re
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from kltune.errors import ModelError
from kltune.lm.data.chat import template_of
from kltune.lm.model.files import quantisation_of, say_once
from kltune.recipe import ModelSection

# Lines of a README: what the SFT adapter changes in one of two tied layers must not reach the other when it is merged.
UNTIE = """head = base.get_output_embeddings()
head.weight = torch.nn.Parameter(head.weight.detach().clone())
base.config.tie_word_embeddings = False
"""
BOTH = """model = PeftModel.from_pretrained(base, "{sft}", adapter_name="sft")   # with it alone on, the reference
model.load_adapter("this/folder", adapter_name="policy")
model.base_model.set_adapter(["sft", "policy"])
"""
HASHES = {
    "sha256": "weights", "tokenizer_sha256": "tokenizer", "template_sha256": "chat template", "dtype": "dtype",
}
SINCE = ("config", "ends", "probe")     # what earlier versions did not record
# Settings of a model that move no logit: where it came from, how it is trained, and what is compared in other ways.
MOVES_NO_LOGIT = re.compile(
    r"^_|dropout|_pdrop$|layerdrop|_token_ids?$|^(initializer|output|summary)_|label|aux_loss"
    r"|^(architectures|(torch_)?dtype|transformers_version|use_cache|return_dict|problem_type|pretraining_tp"
    r"|chunk_size_feed_forward|gradient_checkpointing|task_specific_params)$"
)
AGREES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}     # of what a model says, elsewhere measured
SAID_EVERY = 3.0        # seconds
PROBED_PLACES, PROBED_WORDS = 4, 8


@dataclass(frozen=True)
class Fingerprint:
    """Which reference this is: hashes of its weights, tokenizer and chat template, and what else moves its numbers.

    path, sft_adapter, merge: where the weights came from; without merge the adapter is kept beside them. dtype: of the
    weights that were hashed. merge_survived: share of the SFT adapter's update that survived rounding to that dtype (1
    in float32). untied: the base's head and embedding are one matrix, and have one each since the SFT adapter was
    merged, which acts on one of them. merge_kl: nats a token from what SFT ended with to the rounded merge; None in
    float32. config: the settings of config.json that can move a logit. ends: the fields of its EndTokens. probe: a few
    of its logits on a few tokens, as ``probed`` picks them. The last three are empty where they are not known, the
    probe also of a model that computes in another dtype than its own. base: of an adapter at ``path`` that is the
    reference, the model it lies on; sha256 is then of both. quantization: how the weights are rounded, if they are.
    """

    path: str
    sft_adapter: str | None
    dtype: str
    sha256: str
    tokenizer_sha256: str
    template_sha256: str
    merge_survived: float = 1.0
    untied: bool = False
    merge_kl: float | None = None
    merge: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    ends: dict[str, Any] = field(default_factory=dict)
    probe: list[float] = field(default_factory=list)
    base: str | None = None
    quantization: str | None = None

    @classmethod
    def of(cls, section: ModelSection, model: nn.Module, tokenizer) -> "Fingerprint":
        """Hash what was loaded for a recipe's ``model`` section."""
        return cls(
            path=section.path,
            sft_adapter=section.sft_adapter,
            merge=section.merge,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            sha256=weights_sha256(dict(model.state_dict()), section.path),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            template_sha256=sha256_text(template_of(tokenizer)),
            config=settings_of(model.config),
            quantization=quantisation_of(model.config),
        )

    def of_adapter(self, path: str, weights: dict[str, Tensor]) -> "Fingerprint":
        """This model with the tensors of an adapter, of the file at ``path``, on it: another reference."""
        both = sha256_text(self.sha256 + weights_sha256(weights, path))
        return replace(self, path=path, base=self.path, sha256=both, probe=[])

    def same_model(self, other: "Fingerprint") -> bool:
        """Whether weights and settings are the same, wherever they lie."""
        return (self.sha256, self.dtype, self.config) == (other.sha256, other.dtype, other.config)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for run.json and kltune.json."""
        return asdict(self)

    def differences(self, other: dict[str, Any], *, but: Collection[str] = ()) -> list[str]:
        """What of another fingerprint, as saved, is not the same: one line each, both sides named.

        An earlier version recorded less; what it did is compared, and that is said on stderr.

        but: fields that are held against each other in another way, as the tokenizers over every row.
        """
        mine, here, there = asdict(self), self.path, other.get("path")
        found = [
            f"{what}: found {str(mine[key])[:12]} ({here}), wanted {str(other.get(key))[:12]} ({there})"
            for key, what in HASHES.items() if mine[key] != other.get(key) and key not in but
        ]
        unknown = [name for name in SINCE if not other.get(name)]
        if unknown:
            say_once(f"note: what is recorded of the reference {there} is of an earlier kltune, without "
                     f"{', '.join(unknown)}: only its weights, tokenizer, chat template and dtype can be compared.")
        if "config" not in unknown:
            found += config_differences(self.config, other["config"], here, there)
        found += [
            f"end of a response: {name} found {self.ends.get(name)} ({here}), wanted {wanted} ({there})"
            for name, wanted in (other.get("ends") or {}).items() if self.ends.get(name) != wanted
        ]
        if not found and self.probe and other.get("probe") and not self._says(other["probe"]):
            found = [f"logits: found {self.probe[:3]} … for a few tokens ({here}), wanted {other['probe'][:3]} … "
                     f"({there}), though weights and settings are the same: is it run by other code?"]
        return found

    def _says(self, probe: list[float]) -> bool:
        """Whether the logits of a probe are this one's, to the rounding of another machine."""
        if len(probe) != len(self.probe):
            return False
        gap = sum(abs(mine - theirs) for mine, theirs in zip(self.probe, probe, strict=True))
        return gap <= AGREES.get(getattr(torch, self.dtype), AGREES[torch.float32]) * sum(map(abs, probe))

    def describe(self, *, own: bool = True) -> str:
        """One line for the top of a run. own: it is the policy with its adapter off."""
        merged = ""
        if self.sft_adapter:
            lost = 1.0 - self.merge_survived
            said = [f"{lost:.1%} of its update lost to rounding"] * (lost > 0.01)
            said += [] if self.merge_kl is None else [f"{self.merge_kl:.2g} nats a token from it unmerged"]
            merged = f" + {self.sft_adapter}" + (f" ({', '.join(said)})" if said else "")
        merged = ("" if self.base is None else f" on {self.base}") + merged
        off = " (adapter off)" if own else ""
        merged += "" if self.quantization is None else f", quantised ({self.quantization})"
        return f"reference = {self.path}{merged}, frozen, {self.dtype}, sha256 {self.sha256[:12]}{off}"

    def how_to_load(self, what: str = "LoRA adapter", imports: str = "", use: str = "") -> str:
        """README of a saved adapter: the lines that load it without kltune, ``use`` after them."""
        merged = UNTIE if self.untied else ""
        merged += f'base = PeftModel.from_pretrained(base, "{self.sft_adapter}").merge_and_unload()   # the reference\n'
        load = f'{merged if self.sft_adapter else ""}model = PeftModel.from_pretrained(base, "this/folder")\n'
        if self.sft_adapter and not self.merge:
            load = BOTH.format(sft=self.sft_adapter)
        return (
            f"# {what} made by kltune\n\n"
            f"Its reference (adapter off) has weights sha256 `{self.sha256[:16]}…`, dtype {self.dtype}.\n\n"
            f"```python\nimport torch\nfrom peft import PeftModel\n{imports}from transformers import "
            "AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{self.path}", dtype=torch.{self.dtype})\n'
            f"{load}{use}```\n"
        )


def section_of(reference: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe's ``model`` section that a recorded fingerprint speaks of; earlier ones always merged."""
    section = {name: reference[name] for name in ("path", "sft_adapter", "dtype")}
    return section | {"merge": reference.get("merge", True)}


def sha256_text(text: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def weights_sha256(tensors: dict[str, Tensor], where: str = "the model") -> str:
    """Hex digest over names, types, shapes and bytes; tensors that share storage (tied embeddings) count once.

    Raises:
        ModelError: a number in a tensor is NaN or infinite; ``where`` begins the message.
    """
    digest, seen, said, hashed = hashlib.sha256(), set(), time.monotonic(), 0
    tensors = dict(_unwrapped(tensors))
    for name in sorted(tensors):
        if time.monotonic() - said > SAID_EVERY:
            said = time.monotonic()
            print(f"{where}: {hashed / 1e9:.1f} GB of weights hashed", file=sys.stderr, flush=True)
        tensor = tensors[name].detach()
        if tensor.numel() == 0 or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{where}: {name} has {bad:,} of {tensor.numel():,} weights that are NaN or infinite; wanted finite "
                "ones. Are its files whole? Save it again, or in float32 where it was converted."
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed += tensor.numel() * tensor.element_size()
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _unwrapped(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name; of one that stands for packed numbers, the tensors that it holds."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _unwrapped({f"{name}.{part}": getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]})
        else:
            yield name, tensor


def tokenizer_sha256(tokenizer) -> str:
    """Hex digest of how text becomes ids and back: vocabulary, special ids and, where known, the whole pipeline.

    The padding and truncation that the last call left in a fast tokenizer are not part of it.
    """
    parts: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted(tokenizer.all_special_ids),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        parts["pipeline"] = {
            key: pipeline.get(key) for key in ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
        }
    return sha256_text(json.dumps(parts, sort_keys=True))


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a model that can move a logit, as JSON gives them back; not what its class knows nothing of."""
    known = {"model_type"} | {one.name for one in fields(config)}
    own_class = type(config).__module__.startswith("transformers.")      # other code reads whatever it likes
    found = {}
    for name, value in config.to_dict().items():
        if (name in known or not own_class) and not MOVES_NO_LOGIT.search(name):
            part = vars(config).get(name)
            found[name] = settings_of(part) if isinstance(part, PreTrainedConfig) else value
    return json.loads(json.dumps(found, default=str), parse_constant=str)      # an infinity has no form in JSON


def config_differences(mine: dict[str, Any], other: dict[str, Any], here: str, there: str | None) -> list[str]:
    """Which settings of two models differ, as ``settings_of`` gives them: one line each, both sides named.

    Another version of transformers may have spelled a default out, or under another name: its settings are read again.
    """
    if mine != other:
        # Not where it has a class of its own, or a setting that JSON has no form for: it is compared as it was written.
        with suppress(StrictDataclassError, ValueError, TypeError, LookupError, AttributeError):
            other = settings_of(AutoConfig.for_model(**other))
    return [
        f"config.json: {name} found {json.dumps(mine.get(name))[:60]} ({here}), "
        f"wanted {json.dumps(other.get(name))[:60]} ({there})"
        for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)
    ]


def probed(logits: Tensor) -> list[float]:
    """Some of the logits of a probe, at places and words that are spread evenly. [1, S, V]"""
    places, words = -(-logits.shape[1] // PROBED_PLACES), -(-logits.shape[2] // PROBED_WORDS)
    return [float(f"{value:.6g}") for value in logits[0, places - 1 :: places, ::words].float().flatten().tolist()]
