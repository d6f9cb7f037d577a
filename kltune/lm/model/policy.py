"""A policy and its reference on one set of frozen weights.

The policy is a base model with a LoRA adapter on; the reference is the same weights with the adapter off. The value
function is one more adapter on the same trunk with a small head, so fitting values cannot move the policy. Only full
fine-tuning (``kltune sft`` with ``lora: null``) holds a second, frozen copy of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig
from torch import Tensor, nn

from kltune.core.kl.divergence import TokenMeasures, VocabularySums, measure_sampled, measure_tokens
from kltune.core.kl.fused_head import read_logprobs, read_logprobs_and_head, read_logprobs_and_kl
from kltune.errors import ModelError, RecipeError
from kltune.lm.data.chat import reads_clock, template_of, today
from kltune.lm.data.encoding import OtherTokenizer
from kltune.lm.data.examples import RowRules
from kltune.lm.machine.sharding import layers_of
from kltune.lm.model.adapters.configs import config_beside, lora_config, sort_targets
from kltune.lm.model.adapters.weights import POLICY, VALUE, AdapterSwitch, config_to_fill, fill, load_compatible, wrap
from kltune.lm.model.batches import Rollout, pad_right
from kltune.lm.model.files import reading
from kltune.lm.model.fingerprint import Fingerprint, weights_sha256
from kltune.lm.model.loading import context_of, end_tokens, own_tokenizer, tokenizer_differences
from kltune.lm.model.network import Network, ScalarHead
from kltune.recipe import DataSection, LoraSection


@dataclass(frozen=True)
class Reference:
    """What a policy is held against: its own frozen weights, unless another was asked for.

    network: the model that gives its logits. adapter: which one is on meanwhile where that is the policy's own trunk.
    own: it is what the policy's adapter lies on, or was trained from.
    """

    network: Network
    fingerprint: Fingerprint
    adapter: str | None = None
    own: bool = True


class Policy:
    """A causal language model with a trainable adapter, and the reference behind it."""

    def __init__(self, model: nn.Module, tokenizer, fingerprint: Fingerprint, *, frozen: nn.Module | None = None):
        """Take a loaded model. With ``frozen``, all of ``model`` is trained and ``frozen`` is the reference."""
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.device = next(model.parameters()).device
        self.max_context = context_of(model)
        self.value_head: ScalarHead | None = None
        self.values_above: str | None = None       # the adapter below which the value function's own passes go on
        self.untrained: dict[str, Tensor] = {}
        self.full = frozen is not None
        self._words = min(part.get_input_embeddings().weight.shape[0] for part in (model, frozen) if part is not None)
        # state_dict tensors share storage with the parameters, so hashing them later sees what they hold then.
        self._reference_tensors = dict((frozen or model).state_dict())
        self._frozen_places: dict[str, tuple[nn.Module, str]] = {}
        (frozen or model).requires_grad_(False)
        self.model = model
        self.network = Network(model)
        self.ends = end_tokens(model, tokenizer, self.network.vocabulary)
        self.day = today()  # what a chat template is told that asks for the date
        self.other_tokenizers: tuple[OtherTokenizer, ...] = ()  # that have to make the same of every row
        self.base_network = Network(frozen) if self.full else self.network
        self._held = Reference(self.base_network, fingerprint)
        self._is_reference = False      # at the moment
        self._switch = AdapterSwitch(model)
        model.eval()  # dropout anywhere would make old, new and reference log-probs disagree

    def plan_memory(self, fraction: float, checkpoint_layers: str) -> None:
        """Plan batches for this share of the device's memory; recompute layers as ``optim.checkpoint_layers`` says."""
        for network in (self.network, self.base_network):
            network.batching.fraction, network.batching.checkpoint_layers = fraction, checkpoint_layers

    def add_adapter(self, lora: LoraSection) -> None:
        """Put a fresh LoRA adapter on the trunk: until it is trained, policy = reference."""
        self._wrap(lora_config(lora, self.model, self.fingerprint.path), what="lora.targets")

    def load_adapter(self, folder: Path) -> None:
        """Put a saved adapter on the trunk, every tensor accounted for; raises as ``load_compatible`` and ``fill``."""
        self.network.close()
        weights = load_compatible(folder, self.model)
        if POLICY not in getattr(self.model, "peft_config", {}):
            self._wrap(config_to_fill(folder), what=str(folder))
        fill(self.model, weights, folder)

    def load_trained(self, folder: Path) -> None:
        """Put back what was trained: the adapter, or in full fine-tuning every weight."""
        if not self.full:
            self.load_adapter(folder)
            return
        with reading(folder, "checkpoint"):
            saved = type(self.model).from_pretrained(
                folder, dtype=self.dtype, use_safetensors=True, local_files_only=True
            )
        self.model.load_state_dict(saved.state_dict())

    def _wrap(self, config: PeftConfig, what: str) -> None:
        self.model = wrap(self.model, config, what)
        self._switch = AdapterSwitch(self.model)
        self.model.eval()
        kind = f"an adapter of type {config.peft_type.value}"
        with reading(what, "adapter", failed=f"PEFT cannot run {kind} on token ids alone"):
            self.network.refresh()
        # B is 0 and a magnitude is the base's own: what the adapter's tensors hold where it does nothing.
        self.untrained = {name: tensor.detach().clone() for name, tensor in self.trainable_parameters().items()}

    def add_value_function(self, lora: LoraSection | None, upper: float | None = None) -> None:
        """Add a value head that reads the trunk through a LoRA adapter of its own, or, with None, the policy's trunk.

        upper: the share of the layers, from above, that the adapter is on; None: those that the policy's is on.

        Separate tensors, separate optimizer: fitting values cannot move the policy by a single bit. The adapter is the
        default because a head alone sees little: on stories260K with a reward for a word, of the variance of the next
        batch's returns the adapter came to explain 0.65 to 0.83, and a head fitted to the policy's hidden states, by
        Adam or by least squares, 0.03 to 0.06.
        """
        if lora is not None:
            self.add_beside(VALUE, config_beside(self.model, POLICY, lora, upper, self.fingerprint.path))
            self.values_above = None if upper is None else VALUE
        self.value_head = ScalarHead(self.network.hidden_size).to(self.device)
        for tensor in self.value_parameters().values():
            tensor.requires_grad_(True)

    def load_beside(self, name: str, folder: Path) -> dict[str, Tensor]:
        """Put a saved adapter on the trunk beside the policy's, as ``add_beside`` does; its tensors as they were saved.

        Raises as ``load_adapter``.
        """
        weights = load_compatible(folder, self.model)
        with reading(folder, "adapter", failed="cannot lie beside another on one model"):
            self.add_beside(name, config_to_fill(folder))
        fill(self.model, weights, folder, name)
        return weights

    def add_beside(self, name: str, config: PeftConfig) -> None:
        """Put one more adapter on the trunk, switched off and frozen; the policy stays as it is, to the last bit."""
        trained = {id(tensor) for tensor in self.model.parameters() if tensor.requires_grad}
        self.model.add_adapter(name, config)
        self._switch = AdapterSwitch(self.model)
        for tensor in self.model.parameters():
            tensor.requires_grad_(id(tensor) in trained)  # PEFT froze the policy's
        self.model.eval()
        self.network.refresh()

    def read(self, adapter: str, head: ScalarHead, ids: Tensor, places: Tensor) -> Tensor:
        """What a head reads through an adapter, differentiable in the two. [B, S] and [B, S] bool -> [N] float32."""
        with self._switch.active(adapter):
            return head(self.network.trunk(ids)[places])

    def load_value_parameters(self, tensors: dict[str, Tensor]) -> None:
        """Put saved tensors of the value function back; names and shapes must be its own."""
        for name, parameter in self.value_parameters().items():
            parameter.data.copy_(tensors[name])

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen weights are computed in; adapters and heads are float32."""
        return self.base_network.dtype

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a response."""
        return self.ends.ids

    @property
    def template_day(self) -> date | None:
        """The day that the chat template is told; None if it does not ask."""
        return self.day if reads_clock(self.tokenizer) else None

    def row_rules(self, data: DataSection, max_prompt: int, max_response: int | None = None) -> RowRules:
        """What rows may be, by a recipe's section and limits that fit the model, to become this policy's tokens."""
        rules = RowRules.of(data, self.ends, max_prompt, max_response)
        return replace(rules, day=self.day, others=self.other_tokenizers, max_tokens=self.max_context)

    def hold_against(self, folder: Path, what: str, trust_remote_code: bool = False) -> None:
        """Let the tokenizer that a folder brings, if it is another, make the same of every row, or the row is refused.

        A reference without a chat template takes that of the folder.

        Raises:
            ModelError: it ends responses with another token.
        """
        mine = own_tokenizer(folder, trust_remote_code)
        if mine is None:
            return
        if template_of(mine) and not template_of(self.tokenizer):
            self.tokenizer.chat_template = mine.chat_template
            self.ends = end_tokens(self.model, self.tokenizer, self.network.vocabulary)
        if differences := tokenizer_differences(mine, self.tokenizer):
            other = OtherTokenizer(f"{what} {folder}", mine, tuple(differences))
            if mine.eos_token_id not in {None, *self.ends.ids}:
                raise other.refuse("the end of a response", "tokens")
            self.other_tokenizers += (other,)

    def padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids as the model reads them: right-padded, on its device. [B, S] int64.

        What stands on padding is never read, so a padding token of which the model knows nothing does no harm.

        Raises:
            ModelError: another token has no row in the embedding.
        """
        pad = self.tokenizer.pad_token_id
        ids = pad_right(rows, pad if pad < self._words else 0)
        if (largest := int(ids.max())) >= self._words:
            raise ModelError(
                f"{self.fingerprint.path}: its embedding has {self._words} rows and none for token {largest}, "
                f"{self.tokenizer.convert_ids_to_tokens(largest)!r} of the tokenizer {self.tokenizer.name_or_path}; "
                "give the tokenizer it was trained with, or resize its embedding and save it."
            )
        return ids.to(self.device)

    def prompt_limit(self, wanted: int | None, room_for: int, key: str = "sampling.max_new_tokens") -> int:
        """The longest prompt: what is wanted, or what leaves room for a response; RecipeError if it does not fit.

        key: what says for how many tokens of a response there has to be room.
        """
        if self.max_context is None:
            return wanted or 512
        room = self.max_context - room_for
        if room < 1 or (wanted or 1) > room:
            raise RecipeError(
                f"data.max_prompt_tokens ({wanted or 'default'}) + {key} ({room_for}) do not "
                f"fit the context of {self.fingerprint.path}, {self.max_context} tokens; lower one of them."
            )
        return wanted or room

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The policy's own tensors by name: those of its adapter, or all in full fine-tuning."""
        return dict(self.model.named_parameters()) if self.full else self._switch.parameters(POLICY)

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The value function's tensors by name: its adapter and its head."""
        if self.value_head is None:
            return {}
        return self._switch.parameters(VALUE) | {f"head.{n}": own for n, own in self.value_head.named_parameters()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within: this object is the reference: unless another is held, the frozen weights alone.

        After, exceptions included: the policy.
        """
        before = self.network, self._is_reference
        self.network, self._is_reference = self._held.network, True
        try:
            with self._switch.active(self._held.adapter):
                yield
        finally:
            self.network, self._is_reference = before

    def acting_as(self, adapter: str | None) -> AbstractContextManager[None]:
        """Within: this object is its trunk with an adapter that was put ``add_beside``, or none. After: the policy."""
        return self._switch.active(adapter)

    @property
    def held(self) -> Reference:
        """What the policy is held against."""
        return replace(self._held, fingerprint=self.fingerprint)

    def hold(self, reference: Reference) -> None:
        """Be held against another reference from here on; rows have to fit both models."""
        causal = reference.network.causal
        self._held, self.fingerprint = reference, reference.fingerprint
        limits = self.max_context, context_of(causal)
        self.max_context = min((limit for limit in limits if limit), default=None)
        self._words = min(self._words, causal.get_input_embeddings().weight.shape[0])

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """Within: the adapter's own dropout is on, for supervised stages; the base's stays off, as everywhere."""
        own = [layer.lora_dropout[POLICY] for layer in self._switch.layers]
        try:
            for module in own:
                module.train()
            yield
        finally:
            for module in own:
                module.eval()

    def shard(self) -> None:
        """Spread the frozen layers over the processes of the run (``lm/machine/sharding.py``).

        Adapters that are there by now stay whole, and none comes later.
        """
        places = {
            tensor.data_ptr(): (module, name) for layer in layers_of(self.model) for module in layer.modules()
            for name, tensor in module._parameters.items() if tensor is not None
        }
        held = self._reference_tensors
        frozen = {tensor.data_ptr() for tensor in held.values()}
        self._frozen_places = {n: places[t.data_ptr()] for n, t in held.items() if t.data_ptr() in places}
        # What is spread would be held whole beside its pieces.
        self._reference_tensors = {name: tensor for name, tensor in held.items() if name not in self._frozen_places}
        self.network.shard({tensor for tensor in self.model.parameters() if tensor.data_ptr() not in frozen})

    def frozen_sha256(self) -> str:
        """Hash of the frozen weights as they are now; ``fingerprint.sha256`` for as long as nothing moved them."""
        self.network.open()
        # Copies on a CPU: memory that NumPy has read is not given back when the layers are closed.
        spread = {name: getattr(*place) for name, place in self._frozen_places.items()}
        spread = {name: tensor.clone() if self.device.type == "cpu" else tensor for name, tensor in spread.items()}
        return weights_sha256(self._reference_tensors | spread)

    def save(self, folder: Path) -> None:
        """Write what a loader needs: a plain PEFT adapter (or the full model) and the tokenizer."""
        if self.full:
            self.model.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder, selected_adapters=[POLICY], save_embedding_layers=False)
            sort_targets(folder)
            (folder / "README.md").write_text(self.fingerprint.how_to_load(), encoding="utf-8")
        self.tokenizer.save_pretrained(folder)

    def logprobs(self, ids: Tensor, scored: Tensor, temperature: float = 1.0, lower: Tensor | None = None) -> Tensor:
        """Log-probabilities of the scored tokens, differentiable. [N] float32, nats. lower: as ``Network.before``."""
        reader = partial(read_logprobs, temperature=temperature)
        return self.network.read(self.network.before(ids, scored, lower), reader, ids[scored])[0]

    def logprobs_and_ref_kl(
        self, ids: Tensor, scored: Tensor, temperature: float = 1.0, *others: Callable[[slice], Tensor],
        heads: tuple[Tensor, ...] = (), ref_states: Tensor | None = None, lower: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Log-probabilities and exact KL(policy ‖ reference) per token, all differentiable. Each [N] float32, nats.

        others: whose logits at a slice of these positions are taken as constant; a KL(policy ‖ other) for each follows.
        heads: what ``read_logprobs_and_head`` takes by N positions, for its reading to come last.
        ref_states: the reference's hidden states before the scored tokens, where a measurement kept them. [N, H].
        lower: as ``Network.before``.
        """
        if ref_states is None:
            with torch.no_grad(), self.reference():
                same = self._held.network is self.base_network
                ref_states = self.network.before(ids, scored, lower if same else None)
        reader = partial(read_logprobs_and_head if heads else read_logprobs_and_kl, temperature=temperature)
        return self.network.read(
            self.network.before(ids, scored, lower), reader, ids[scored], *heads,
            lambda part: self.ref_logits(ref_states[part]), *others,
        )

    def values(self, ids: Tensor, scored: Tensor, lower: Tensor | None = None) -> Tensor:
        """Expected return before each scored token, differentiable in the value function only. [N] float32."""
        with self._switch.active(VALUE):
            return self.value_head(self.network.trunk_before(ids, scored, lower, self.values_above))

    def lower_of_values(self, rollout: Rollout) -> Tensor | None:
        """What ``values`` goes on from: what the frozen layers below its own give, or as all passes do. [B, S, H]."""
        if self.values_above is None:
            return rollout.lower
        with self._switch.active(VALUE):
            return self.network.lower_states(rollout.ids, rollout.scored, VALUE)

    def measure(
        self, ids: Tensor, scored: Tensor, temperature: float = 1.0, *, exact: bool = True, swap: bool = False,
        sums: VocabularySums | None = None, states: dict[str, Tensor | None] | None = None,
        lower: Tensor | None = None,
    ) -> TokenMeasures:
        """Teacher-force sequences through policy and reference.

        Args:
            ids: right-padded sequences. [B, S] int64.
            scored: True on the tokens to measure, never in column 0. [B, S] bool.
            temperature: of both distributions; the one the tokens were sampled at.
            exact: also sum over the vocabulary, for exact KL and entropies.
            swap: let the two change places: then ``ref_kl`` is KL(reference ‖ policy), for the reference's samples.
            sums: what each token of the vocabulary adds to the exact KL is added here.
            states, lower: as in ``over_vocabulary``.
        """
        function = partial(measure_tokens if exact else measure_sampled, temperature=temperature)
        if swap:
            measure = function
            function = lambda logits, ref_logits, tokens, **more: measure(ref_logits, logits, tokens, **more)  # noqa: E731
        return TokenMeasures(*self.over_vocabulary(ids, scored, function, sums, states, lower))

    @torch.no_grad()
    def over_vocabulary(
        self, ids: Tensor, scored: Tensor, function: Callable[..., tuple], sums: VocabularySums | None = None,
        states: dict[str, Tensor | None] | None = None, lower: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Call a function on every scored position, a chunk at a time, so that memory does not grow with their number.

        Policy and reference take a pass each: one batch of both (PEFT's adapter_names) was 1.1 to 1.2 times slower.
        Within ``reference()`` the two are one, and so is the pass.

        The function takes the policy's logits [n, V], the reference's [n, V] and the tokens [n], and gives numbers [n]
        or None; with ``sums`` it takes some by that name, to add to. Returned is what it gave, row by row; [N] each, or
        None. Of ``states``, those that have a name there are kept: "states" of the policy, "ref_states" of the
        reference, as ``Network.before`` gives them; [N, H] each. lower: as it takes it.
        """
        parts, rows, wanted = self.network.parts(ids, scored), self.network.chunk_rows, tuple(states or ())

        def some(place: int) -> tuple[Tensor | None, ...]:
            part, marks = parts[place]
            own = {} if sums is None else {"sums": VocabularySums.zero(self.network.vocabulary)}
            below = parts.rows_of(lower, place)
            hidden = ref_hidden = self.network.before(part, marks, below)
            if not self._is_reference:
                with self.reference():
                    same = self._held.network is self.base_network
                    ref_hidden = self.network.before(part, marks, below if same else None)
            chunks = zip(hidden.split(rows), ref_hidden.split(rows), part[marks].split(rows), strict=True)
            found = [
                function(self.network.logits(mine), self.ref_logits(others), tokens, **own)
                for mine, others, tokens in chunks
            ]
            columns = [None if column[0] is None else torch.cat(column) for column in zip(*found, strict=True)]
            kept = {"states": hidden, "ref_states": ref_hidden}
            return *columns, *(kept[name] for name in wanted), *(own["sums"].tensors() if own else (None,) * 3)

        found = parts.spread(some)
        for row in found if sums is not None else ():      # in this order, whoever added up what
            sums.add(row[-3:])
        columns = parts.joined([row[:-3] for row in found])
        if states is not None:
            states.update(zip(wanted, columns[len(columns) - len(wanted) :], strict=True))
        return columns[: len(columns) - len(wanted)]

    @property
    def head_reads_states(self) -> bool:
        """Whether the value function is a head alone on the very hidden states that measuring the policy computes."""
        alone = self.value_head is not None and not self._switch.parameters(VALUE)
        return alone and self.network.split and self._held.network.split

    @torch.no_grad()
    def measure_values(
        self, ids: Tensor, scored: Tensor, states: Tensor | None = None, lower: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``values`` without gradients, rows in parts; and what a head alone reads. [N] float32, and [N, H] or None.

        states: what ``head_reads_states``, where a measurement kept it. [N, H]. lower: as ``Network.before``.
        """
        parts = self.network.parts(ids, scored)
        if self._switch.parameters(VALUE):
            return parts.over(lambda at: (self.values(*parts[at], parts.rows_of(lower, at)),))[0], None
        if states is None:
            (states,) = parts.over(lambda place: (self.network.trunk_before(*parts[place]),))
        return self.value_head(states), states

    @torch.no_grad()
    def measure_logprobs(self, ids: Tensor, scored: Tensor, temperature: float = 1.0) -> Tensor:
        """``logprobs`` without gradients, rows in parts. [N] float32, nats."""
        parts = self.network.parts(ids, scored)
        return parts.over(lambda place: (self.logprobs(*parts[place], temperature),))[0]

    def micro_batches(self, rollout: Rollout, sequences: int | None) -> list[Tensor]:
        """Rows of a rollout in the parts they are trained on: see ``Network.micro_batches``."""
        lengths = self.network.batching.lengths(rollout.ids, rollout.scored)
        return [torch.tensor(rows, device=self.device) for rows in self.network.micro_batches(lengths, sequences)]

    def ref_logits(self, ref_hidden: Tensor) -> Tensor:
        """Logits of the reference from its hidden states. [N, H] -> [N, V]; no gradient."""
        with torch.no_grad(), self.reference():  # the head itself may carry an adapter
            return self.network.logits(ref_hidden)
