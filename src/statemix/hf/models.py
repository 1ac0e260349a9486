"""A SequenceModel, its layers, and a classifier on them as models of transformers.

`save_pretrained` copies this file beside the weights, for where statemix.hf is not imported: so it is all that
transformers needs, and what it imports of statemix it does by whole names.
"""

from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from statemix.gates import check_floats
from statemix.hf.reading import StateCache, read_past_padding
from statemix.model import SequenceModel
from statemix.training.checkpoint import find_checkpoint

# What `output.past_key_values` is called in the release that is installed.
CACHE_NAME = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__annotations__)


class StatemixConfig(PreTrainedConfig):
    """The options of a SequenceModel under their own names, but for `tied_embedding`: here `tie_word_embeddings`."""

    model_type = "statemix"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model", "num_hidden_layers": "num_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 256,
        d_model: int = 64,
        num_layers: int = 1,
        mixer: dict[str, Any] | None = None,
        mlp_size: int | None = None,
        init_std: float | None = None,
        dropout: float = 0.0,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size, self.d_model, self.num_layers = vocab_size, d_model, num_layers
        self.mixer = {"name": "bd_lru", "num_blocks": 16, "block_size": 4} if mixer is None else dict(mixer)
        self.mlp_size, self.init_std, self.dropout, self.use_cache = mlp_size, init_std, dropout, use_cache
        self.pad_token_id = pad_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


class Reading(NamedTuple):
    """What the layers make of a batch: all that the heads need.

    x: (B, T, D), the normalised residual stream.
    hidden_states: where they were asked for, the embedding and the outputs of the layers, of the last one x: (B, T, D).
    mask: (B, T) or, with what the cache has read, longer; False is padding. None: there is none.
    cache: with what has been read now. None: it was not asked for.
    """

    x: Tensor
    hidden_states: tuple[Tensor, ...] | None
    mask: Tensor | None
    cache: StateCache | None


class StatemixPreTrainedModel(PreTrainedModel):
    """What all these models share: a SequenceModel, as `model`, and the calls of transformers.

    All `forward` take, besides what each says:

        input_ids: (B, T), or else inputs_embeds, (B, T, D): what the layers read in place of the rows of the embedding.
        attention_mask: (B, T) or, with what the cache has read, longer; 0 is padding. None: there is none.
        past_key_values, or cache, as transformers 5.24 and newer say: what an earlier call returned; it is brought
            forward in place.
        use_cache: return a cache. None: as the config says, but not in training and not with labels.
        output_hidden_states: return a tuple of num_layers + 1 tensors (B, T, D): the embedding and the output of each
            layer, the last one normalised. At padding there is what stands before it, or anything. None: as the config.
        return_dict: False: a tuple.
        others: what releases of transformers hand over besides: `cache_position`, `position_ids` (B, T) or (1, T),
            which must go up by one from token to token, and `output_attentions`, which must be False or None.

    and raise TypeError, ValueError or IndexError as `SequenceModel`, or where mask, embeddings or positions do not fit,
    or a keyword is unknown. `gradient_checkpointing_enable()` lets each layer keep in training what it reads and
    nothing else; the backward runs it again.
    """

    config_class = StatemixConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    has_next_token_head: ClassVar[bool] = False
    accepts_loss_kwargs = False  # where a loss is a mean over rows, Trainer is to take the mean over parts of a batch
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _is_stateful = True  # a state cannot be taken back: no assisted generation
    model: SequenceModel

    def __init__(self, config: StatemixConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        for name, part in self._parts(config).items():
            setattr(self, name, part)
        if not self.model.embedding.weight.is_meta:  # the constructor has drawn them, so `initialize_weights` need not
            for tensor in self.state_dict(keep_vars=True).values():
                tensor._is_hf_initialized = True
        self.post_init()

    @classmethod
    def from_statemix(cls, folder: str | Path, **options: Any) -> Self:
        """The model of a run's best checkpoint, or in a folder that `SequenceModel.save` wrote; others' heads are new.

        Args:
            folder: of the run or the model.
            options: others of the config, such as num_labels.

        Raises:
            ValueError: there is none, or of another kind; the message names the file.
        """
        model = SequenceModel.load(find_checkpoint(folder))
        own = dict(model.config)
        config = StatemixConfig(tie_word_embeddings=own.pop("tied_embedding"), **own, **options)
        with torch.device("meta"):
            self = cls(config)
        self.model = model if cls.has_next_token_head else _without_head(model)
        for name, head in cls._heads(config).items():
            setattr(self, name, head.to(model.embedding.weight.dtype))
        return self.eval()

    @classmethod
    def _heads(cls, config: StatemixConfig) -> dict[str, nn.Module]:
        """The modules besides the SequenceModel, newly drawn, by their names."""
        return {}

    @classmethod
    def _parts(cls, config: StatemixConfig) -> dict[str, nn.Module]:
        """All modules, newly drawn, by their names."""
        model = _sequence_model(config)
        return {"model": model if cls.has_next_token_head else _without_head(model)} | cls._heads(config)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw, as the constructor does, what a checkpoint did not bring: such a tensor has no mark of transformers.

        It is not done module by module, as elsewhere: a mixer's constructor sets it up as a whole.
        """
        tensors = self.state_dict(keep_vars=True)
        missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            drawn = nn.ModuleDict(self._parts(self.config)).state_dict()
            for name in missing:
                tensors[name].copy_(drawn[name])

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a new embedding or head of `resize_token_embeddings` as the constructor does."""
        if not isinstance(module, nn.Embedding | nn.Linear):
            return
        if self.config.init_std is None:
            module.reset_parameters()
        else:
            nn.init.normal_(module.weight, std=self.config.init_std)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Exchange the embedding, as `resize_token_embeddings` does."""
        self.model.embedding = value
        self.model.config["vocab_size"] = value.num_embeddings

    def _refuse(self, kind: type[Exception], text: str) -> NoReturn:
        raise kind(f"{type(self).__name__}: {text}")

    def _read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        caches: tuple[StateCache | None, StateCache | None],
        use_cache: bool | None,
        output_hidden_states: bool | None,
        others: dict[str, Any],
        *,
        labels: Tensor | None = None,
        only_real: bool = False,
    ) -> Reading:
        """What the layers make of the arguments of `forward`, once these are checked.

        only_real: of x and hidden states nothing is asked for at padding.
        """
        inputs = self._check_inputs(input_ids, inputs_embeds)
        cache = self._check_caches(*caches)
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and labels is None and not self.training)
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        cache = StateCache() if cache is None else cache
        mask = None if attention_mask is None else self._check_mask(attention_mask, inputs)
        real = None if mask is None else mask[:, -inputs.shape[1] :]
        self._check_positions(others.pop("position_ids", None), inputs, real)
        self._check_others(others, cache)
        self.model.recompute = self.gradient_checkpointing and self.training
        short = only_real and not use_cache
        streams, state = read_past_padding(
            self.model, inputs, real, cache.state, only_real=short, every=output_hidden_states
        )
        if use_cache:
            cache.state, cache.length = state, cache.length + inputs.shape[1]
        return Reading(streams[-1], streams if output_hidden_states else None, mask, cache if use_cache else None)

    def _check_inputs(self, tokens: Tensor | None, embedded: Tensor | None) -> Tensor:
        """Those of the two that are given; Raises TypeError or ValueError unless one is, and fits."""
        if (tokens is None) == (embedded is None):
            got = "none" if tokens is None else "both"
            self._refuse(ValueError, f"one of `input_ids` and `inputs_embeds` must be given, got {got}.")
        if embedded is None:
            assert tokens is not None
            return tokens
        check_floats(type(self).__name__, "inputs_embeds", embedded)
        shape, size, own = tuple(embedded.shape), self.config.d_model, self.model.embedding.weight.dtype
        if len(shape) != 3 or shape[2] != size or 0 in shape:
            rule = f"(B, T, D) with D = {size}, and the others at least 1"
            self._refuse(ValueError, f"`inputs_embeds` must have shape {rule}, got {shape}.")
        if embedded.dtype != own and not torch.is_autocast_enabled(embedded.device.type):
            self._refuse(TypeError, f"`inputs_embeds` must be {own} like the parameters, got {embedded.dtype}.")
        return embedded

    def _check_caches(self, past: StateCache | None, cache: StateCache | None) -> StateCache | None:
        """The one that is given of two names of one argument."""
        if past is not None and cache is not None:
            self._refuse(TypeError, "`past_key_values` and `cache` are one argument, got both.")
        cache = past if cache is None else cache
        if not isinstance(cache, StateCache | None):
            self._refuse(TypeError, f"`cache` must be a StateCache, got {type(cache).__name__}.")
        return cache

    def _check_others(self, others: dict[str, Any], cache: StateCache) -> None:
        """Raise TypeError or ValueError unless the keywords that transformers adds ask for nothing that is not done."""
        if others.pop("output_attentions", None) or getattr(self.config, "output_attentions", False):
            self._refuse(ValueError, "`output_attentions` must be False, it is not served, got True.")
        cache_position = others.pop("cache_position", None)
        if cache_position is not None and int(cache_position[0]) != cache.length:
            rule = f"begin with the {cache.length} tokens that the cache has read"
            self._refuse(ValueError, f"`cache_position` must {rule}, got {int(cache_position[0])}.")
        if others:
            self._refuse(TypeError, f"`{sorted(others)[0]}` is not an argument of `forward`.")

    def _check_positions(self, positions: Tensor | None, inputs: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError unless positions go up by one from real token to real token."""
        if positions is None:
            return
        if positions.ndim != 2 or positions.shape[1] != inputs.shape[1]:
            wanted, got = tuple(inputs.shape[:2]), tuple(positions.shape)
            self._refuse(ValueError, f"`position_ids` must have shape (B, T) = {wanted}, got {got}.")
        rows = positions.expand(len(inputs), -1)
        for number, row in enumerate(rows if mask is not None else positions):
            steps = (row if mask is None else row[mask[number]]).diff()
            if not bool((steps == 1).all()):
                self._refuse(
                    ValueError,
                    "`position_ids` must go up by one from token to token, as a state does, got a step of "
                    f"{int(steps[steps != 1][0])} in row {number}. Packed sequences are not served here: use `reset` "
                    "of SequenceModel.",
                )

    def _check_mask(self, mask: Tensor, inputs: Tensor) -> Tensor:
        shape, wanted = tuple(mask.shape), tuple(inputs.shape[:2])
        if len(shape) != 2 or shape[0] != wanted[0] or shape[1] < wanted[1]:
            self._refuse(ValueError, f"`attention_mask` must have shape (B, T) = {wanted}, got {shape}.")
        return mask.bool()


class StatemixModel(StatemixPreTrainedModel):
    """The layers of a SequenceModel, without a head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> Any:
        """The normalised residual stream, (B, T, D), as `last_hidden_state`, and the cache.

        Of padding behind a row's end it has what stands before it, or anything where no cache is asked for.
        """
        caches = past_key_values, cache
        read = self._read(
            input_ids, inputs_embeds, attention_mask, caches, use_cache, output_hidden_states, others, only_real=True
        )
        return _output(BaseModelOutputWithPast, read, return_dict, last_hidden_state=read.x)


class StatemixForCausalLM(StatemixPreTrainedModel, GenerationMixin):
    """A SequenceModel, as `model`."""

    has_next_token_head = True
    accepts_loss_kwargs = True  # Trainer counts the targets of all parts of a batch, as `num_items_in_batch`
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.head.weight": "model.embedding.weight"}

    def save_statemix(self, folder: str | Path) -> None:
        """Write model.json and model.safetensors into an existing folder: `load_model` reads them."""
        self.model.save(folder)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Exchange the head."""
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: StateCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits of the next token, the loss if there are labels, and the cache.

        Args:
            input_ids, attention_mask, past_key_values, use_cache, return_dict, cache, inputs_embeds,
                output_hidden_states, others: see `StatemixPreTrainedModel`.
            labels: (B, T), `input_ids` or -100 where a token does not count: shifted here, as transformers does. The
                first token of a row does not count.
            logits_to_keep: of so many last positions, or of these. 0: of all.
            num_items_in_batch: targets of the whole batch of which this is a part: the loss is over them. None: of
                this part.
        """
        read = self._read(
            input_ids,
            inputs_embeds,
            attention_mask,
            (past_key_values, cache),
            use_cache,
            output_hidden_states,
            others,
            labels=labels,
            only_real=labels is not None,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(read.x[:, kept])
        loss = None
        if labels is not None:
            if read.mask is not None:  # no token is predicted from padding alone
                first = read.mask & (read.mask.cumsum(1) == 1)
                labels = labels.masked_fill(first[:, -read.x.shape[1] :], -100)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return _output(CausalLMOutputWithPast, read, return_dict, loss=loss, logits=logits)


class StatemixForSequenceClassification(StatemixPreTrainedModel):
    """Logits of classes, or the targets of a regression: a linear map of what the layers hold at a row's last token."""

    @classmethod
    def _heads(cls, config: StatemixConfig) -> dict[str, nn.Module]:
        score = nn.Linear(config.d_model, config.num_labels, bias=False)
        if config.init_std is not None:
            nn.init.normal_(score.weight, std=config.init_std)
        return {"score": score}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits (B, num_labels), the loss if there are labels, and the cache.

        Args:
            input_ids, past_key_values, use_cache, return_dict, cache, inputs_embeds, output_hidden_states, others: see
                `StatemixPreTrainedModel`.
            attention_mask: (B, T); 0 is padding. It may be None for one row, or where `config.pad_token_id` tells
                padding from tokens.
            labels: by `config.problem_type`, or if that is None, by num_labels and their dtype: (B,) of classes,
                cross-entropy; (B, num_labels) of 0. and 1., binary cross-entropy; (B,) or (B, num_labels), the mean of
                squares.
        """
        if attention_mask is None:
            attention_mask = self._mask_of(input_ids, inputs_embeds)
        read = self._read(
            input_ids,
            inputs_embeds,
            attention_mask,
            (past_key_values, cache),
            use_cache,
            output_hidden_states,
            others,
            labels=labels,
            only_real=True,
        )
        rows, steps = read.x.shape[:2]
        last = torch.full((rows,), steps - 1, device=read.x.device)
        if read.mask is not None:
            real = read.mask[:, -steps:]
            if not (some := real.any(1)).all():
                row = int(some.int().argmin())
                self._refuse(ValueError, f"each row must have a token that is not padding, got none in row {row}.")
            last = (real * torch.arange(1, steps + 1, device=real.device)).argmax(1)
        logits = self.score(read.x[torch.arange(rows, device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return _output(SequenceClassifierOutputWithPast, read, return_dict, loss=loss, logits=logits)

    def _mask_of(self, tokens: Tensor | None, embedded: Tensor | None) -> Tensor | None:
        """The mask where none is given. Raises ValueError if there are rows, and nothing tells where they end."""
        if tokens is not None and self.config.pad_token_id is not None:
            return tokens != self.config.pad_token_id
        given = tokens if embedded is None else embedded
        if given is not None and len(given) > 1:
            self._refuse(
                ValueError,
                "`attention_mask` must say where each row ends, of ones if none is padded, got None for "
                f"{len(given)} rows and no token ids with a `config.pad_token_id`.",
            )
        return None


def _output(kind: type, read: Reading, return_dict: bool | None, **fields: Any) -> Any:
    """What `forward` returns, of a kind of transformers'."""
    output = kind(**fields, **{CACHE_NAME: read.cache}, hidden_states=read.hidden_states)
    return output.to_tuple() if return_dict is False else output


def _without_head(model: SequenceModel) -> SequenceModel:
    del model.head  # its layers are all that is run
    return model


def _sequence_model(config: StatemixConfig) -> SequenceModel:
    return SequenceModel(
        config.vocab_size,
        config.d_model,
        config.num_layers,
        config.mixer,
        mlp_size=config.mlp_size,
        tied_embedding=config.tie_word_embeddings,
        init_std=config.init_std,
        dropout=config.dropout,
    )
