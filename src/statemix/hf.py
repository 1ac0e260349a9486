"""SequenceModel as a model of Hugging Face's transformers, the extra `hf`: importing this registers it.

    import statemix.hf
    model = statemix.hf.StatemixForCausalLM.from_statemix("runs/shakespeare")
    model.save_pretrained("folder")                  # AutoModelForCausalLM.from_pretrained("folder") reads it
    model.generate(...), pipeline("text-generation", model, tokenizer=...), Trainer(model, ...)

The cache of `generate` is the recurrent state: of constant size, reordered for beams. Padding, wherever it stands,
leaves the state as it is, so that a row of a batch gives what it gives alone. transformers hands the cache over as
`past_key_values`, and from 5.24 on as `cache`: both names are served, and a keyword that is not known is refused.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from statemix.backbone import State
from statemix.model import SequenceModel
from statemix.text.tokenizer import BPE, Characters, Tokenizer
from statemix.training.checkpoint import find_checkpoint

try:
    import tokenizers
    from transformers import (
        AddedToken,
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError("statemix.hf: it needs transformers 5 or newer: pip install 'statemix[hf]'.") from error


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
        **others: Any,
    ) -> None:
        self.vocab_size, self.d_model, self.num_layers = vocab_size, d_model, num_layers
        self.mixer = {"name": "bd_lru", "num_blocks": 16, "block_size": 4} if mixer is None else dict(mixer)
        self.mlp_size, self.init_std, self.dropout, self.use_cache = mlp_size, init_std, dropout, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


class StateCache:
    """The state after all tokens so far, as the cache that transformers' `generate` carries along.

    Args:
        state: of the model, one (B, M, N) per layer. None: nothing has been read.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # it knows its length, so `generate` leaves out of a longer text what has been read

    def __init__(self, state: State | None = None) -> None:
        self.state, self.length = state, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, with padding."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on as row beam_idx[b]."""
        if self.state is not None:
            self.state = tuple(part.index_select(0, beam_idx.to(part.device)) for part in self.state)

    def crop(self, tokens_to_remove: int) -> None:
        """Raise RuntimeError: what was read cannot be taken back from a state, as assisted generation would have it."""
        raise RuntimeError(
            f"StateCache: a recurrent state cannot be cropped, got crop({tokens_to_remove}). Generate without an "
            "assistant model and without prompt lookup."
        )


class StatemixForCausalLM(PreTrainedModel, GenerationMixin):
    """A SequenceModel, as `model`, with the calls of transformers."""

    config_class = StatemixConfig
    main_input_name = "input_ids"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.head.weight": "model.embedding.weight"}
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _is_stateful = True  # a state cannot be taken back: no assisted generation
    accepts_loss_kwargs = True  # Trainer counts the targets of all parts of a batch, as `num_items_in_batch`

    def __init__(self, config: StatemixConfig) -> None:
        super().__init__(config)
        self.model = _sequence_model(config)
        if not self.model.embedding.weight.is_meta:  # the constructor has drawn them, so `initialize_weights` need not
            for tensor in self.model.state_dict(keep_vars=True).values():
                tensor._is_hf_initialized = True
        self.post_init()

    @classmethod
    def from_statemix(cls, folder: str | Path) -> Self:
        """The model of a run's best checkpoint, or in a folder that `SequenceModel.save` wrote.

        Raises:
            ValueError: there is none, or of another kind; the message names the file.
        """
        model = SequenceModel.load(find_checkpoint(folder))
        options = dict(model.config)
        config = StatemixConfig(tie_word_embeddings=options.pop("tied_embedding"), **options)
        with torch.device("meta"):
            self = cls(config)
        self.model = model
        return self.eval()

    def save_statemix(self, folder: str | Path) -> None:
        """Write model.json and model.safetensors into an existing folder: `load_model` reads them."""
        self.model.save(folder)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw, as the constructor does, what a checkpoint did not bring: such a tensor has no mark of transformers.

        It is not done module by module, as elsewhere: a mixer's constructor sets it up as a whole.
        """
        tensors = self.model.state_dict(keep_vars=True)
        missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            drawn = _sequence_model(self.config).state_dict()
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

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Exchange the head."""
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: StateCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """Logits of the next token.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T) or, with what the cache has read, longer; 0 is padding. None: there is none.
            past_key_values: what an earlier call returned; it is brought forward in place.
            labels: (B, T), `input_ids` or -100 where a token does not count: shifted here, as transformers does. The
                first token of a row does not count.
            use_cache: return a cache. None: as the config says, but not in training and not with labels.
            logits_to_keep: of so many last positions, or of these. 0: of all.
            return_dict: False: a tuple.
            cache: another name of `past_key_values`, that of transformers 5.24 and newer.
            num_items_in_batch: targets of the whole batch of which this is a part: the loss is over them. None: of
                this part.
            others: what releases of transformers hand over besides: `cache_position`, `position_ids` (B, T) or (1, T),
                which must go up by one from token to token, `output_attentions` and `output_hidden_states`, which must
                be False or None, and `inputs_embeds`, which must be None.

        Returns:
            Logits, the loss if there are labels, and the cache, as `past_key_values` or, from 5.24 on, as `cache`.

        Raises:
            TypeError, ValueError, IndexError: as of `SequenceModel`; or the mask or the positions do not fit, or a
                keyword is unknown.
        """
        if past_key_values is not None and cache is not None:
            raise TypeError("StatemixForCausalLM: `past_key_values` and `cache` are one argument, got both.")
        cache = past_key_values if cache is None else cache
        if not isinstance(cache, StateCache | None):
            raise TypeError(f"StatemixForCausalLM: `cache` must be a StateCache, got {type(cache).__name__}.")
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and labels is None and not self.training)
        cache = StateCache() if cache is None else cache
        mask = None if attention_mask is None else self._check_mask(attention_mask, input_ids)
        real = None if mask is None else mask[:, -input_ids.shape[1] :]
        self._check_positions(others.pop("position_ids", None), input_ids, real)
        self._check_others(others, cache)
        x, state = self._read(input_ids, real, cache.state, training=labels is not None and not use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(x[:, kept])
        loss = None
        if labels is not None:
            if mask is not None:  # no token is predicted from padding alone
                first = mask & (mask.cumsum(1) == 1)
                labels = labels.masked_fill(first[:, -input_ids.shape[1] :], -100)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if use_cache:
            cache.state, cache.length = state, cache.length + input_ids.shape[1]
            output[CACHE_NAME] = cache
        return output.to_tuple() if return_dict is False else output

    def _check_others(self, others: dict[str, Any], cache: StateCache) -> None:
        """Raise TypeError or ValueError unless the keywords that transformers adds ask for nothing that is not done."""
        for name in ("output_attentions", "output_hidden_states"):
            if others.pop(name, None) or getattr(self.config, name, False):
                raise ValueError(f"StatemixForCausalLM: `{name}` must be False, it is not served, got True.")
        cache_position = others.pop("cache_position", None)
        if cache_position is not None and int(cache_position[0]) != cache.length:
            got = int(cache_position[0])
            raise ValueError(
                f"StatemixForCausalLM: `cache_position` must begin with the {cache.length} tokens that the cache has "
                f"read, got {got}."
            )
        if others.get("inputs_embeds") is None:
            others.pop("inputs_embeds", None)  # early releases say that there are none
        if others:
            raise TypeError(f"StatemixForCausalLM: `{sorted(others)[0]}` is not an argument of `forward`.")

    @staticmethod
    def _check_positions(positions: Tensor | None, tokens: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError unless positions go up by one from real token to real token."""
        if positions is None:
            return
        if positions.ndim != 2 or positions.shape[1] != tokens.shape[1]:
            wanted, got = tuple(tokens.shape), tuple(positions.shape)
            raise ValueError(f"StatemixForCausalLM: `position_ids` must have shape (B, T) = {wanted}, got {got}.")
        rows = positions.expand(len(tokens), -1)
        for number, row in enumerate(rows if mask is not None else positions):
            steps = (row if mask is None else row[mask[number]]).diff()
            if not bool((steps == 1).all()):
                raise ValueError(
                    "StatemixForCausalLM: `position_ids` must go up by one from token to token, as a state does, got a "
                    f"step of {int(steps[steps != 1][0])} in row {number}. Packed sequences are not served here: use "
                    "`reset` of SequenceModel."
                )

    @staticmethod
    def _check_mask(mask: Tensor, tokens: Tensor) -> Tensor:
        shape, wanted = tuple(mask.shape), tuple(tokens.shape)
        if len(shape) != 2 or shape[0] != wanted[0] or shape[1] < wanted[1]:
            raise ValueError(f"StatemixForCausalLM: `attention_mask` must have shape (B, T) = {wanted}, got {shape}.")
        return mask.bool()

    def _read(self, tokens: Tensor, mask: Tensor | None, state: State | None, training: bool) -> tuple[Tensor, State]:
        """`SequenceModel.run_layers` past padding, whose position has what stands before it."""
        if mask is None or mask.all():
            return self.model.run_layers(tokens, state, None)
        begins = mask & ~nn.functional.pad(mask, (1, -1))
        if state is None and (begins.sum(1) == 1).all() and (training or mask[:, -1].all()):
            # in one stretch: what is before it is forgotten at its first token, what is behind it is not asked for
            return self.model.run_layers(tokens, None, begins)
        rows = []
        for row, real in enumerate(mask):
            own = self.model.initial_state(1) if state is None else tuple(part[row : row + 1] for part in state)
            x = self.model.embedding.weight.new_zeros(1, 1, self.model.config["d_model"])
            if real.any():
                x, own = self.model.run_layers(tokens[row : row + 1, real], own, None)
            rows.append((x[:, (real.cumsum(0) - 1).clamp(min=0)], own))
        xs, states = zip(*rows, strict=True)
        return torch.cat(xs), tuple(torch.cat(parts) for parts in zip(*states, strict=True))


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


PAD_BYTE, PAD_TOKEN = 255, "<|pad|>"


def hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokens as a tokenizer of transformers.

    That of bytes has `<|pad|>` for padding: the byte 255, which is in no UTF-8 text. Only where a text has these
    letters themselves, transformers takes them for it. The others have no token to spare: with an attention mask any
    will do, such as `pad_token_id=0` for `generate`.
    """
    special = {}
    if isinstance(tokenizer, BPE):
        inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    elif isinstance(tokenizer, Characters):
        places = {character: place for place, character in enumerate(tokenizer.alphabet)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(places))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        inner.decoder = tokenizers.decoders.Fuse()
    else:
        # a byte goes by its own character if that is printable, or else by the next from U+0100
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        others = (character for character in alphabet if ord(character) > 255)
        places = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
        places = {PAD_TOKEN if byte == PAD_BYTE else name: byte for name, byte in places.items()}
        special["pad_token"] = AddedToken(PAD_TOKEN, special=True, normalized=False)
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(places, []))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


# What `output.past_key_values` is called in the release that is installed.
CACHE_NAME = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__annotations__)

if __name__ == "statemix.hf":  # and not a copy of this file that a saved folder brought along
    AutoConfig.register(StatemixConfig.model_type, StatemixConfig)
    AutoModelForCausalLM.register(StatemixConfig, StatemixForCausalLM)
    StatemixConfig.register_for_auto_class()
    StatemixForCausalLM.register_for_auto_class("AutoModelForCausalLM")
