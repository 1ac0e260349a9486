"""SequenceModel as a model of Hugging Face's transformers, the extra `hf`: importing this registers it.

    import statemix.hf
    model = statemix.hf.StatemixForCausalLM.from_statemix("runs/shakespeare")
    model.save_pretrained("folder")                  # AutoModelForCausalLM.from_pretrained("folder") reads it
    model.generate(...), pipeline("text-generation", model, tokenizer=...), Trainer(model, ...)

The cache of `generate` is the recurrent state: of constant size, reordered for beams. Padding, wherever it stands,
leaves the state as it is, so that a row of a batch gives what it gives alone.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from statemix.generate import find_checkpoint, zero_state
from statemix.model import SequenceModel, State
from statemix.text.tokenizer import BPE, Characters, Tokenizer

try:
    import tokenizers
    from transformers import (
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
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

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

    def __init__(self, state: State | None = None) -> None:
        self.state, self.length = state, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, with padding."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on as row beam_idx[b]."""
        if self.state is not None:
            self.state = tuple(part.index_select(0, beam_idx.to(part.device)) for part in self.state)


class StatemixForCausalLM(PreTrainedModel, GenerationMixin):
    """A SequenceModel, as `model`, with the calls of transformers."""

    config_class = StatemixConfig
    main_input_name = "input_ids"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.head.weight": "model.embedding.weight"}
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _is_stateful = True  # a state cannot be taken back: no assisted generation

    def __init__(self, config: StatemixConfig) -> None:
        super().__init__(config)
        self.model = SequenceModel(
            *(config.vocab_size, config.d_model, config.num_layers, config.mixer),
            mlp_size=config.mlp_size,
            tied_embedding=config.tie_word_embeddings,
            init_std=config.init_std,
            dropout=config.dropout,
        )
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
        return self

    def save_statemix(self, folder: str | Path) -> None:
        """Write model.json and model.safetensors into an existing folder: `load_model` reads them."""
        self.model.save(folder)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def _init_weights(self, module: nn.Module) -> None:
        pass  # SequenceModel has drawn them

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

        Returns:
            Logits, the loss if there are labels, and the cache as `past_key_values`.

        Raises:
            TypeError, ValueError, IndexError: as of `SequenceModel`; or the mask does not fit.
        """
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and labels is None and not self.training)
        cache = StateCache() if past_key_values is None else past_key_values
        mask = None if attention_mask is None else self._check_mask(attention_mask, input_ids)
        real = None if mask is None else mask[:, -input_ids.shape[1] :]
        x, state = self._read(input_ids, real, cache.state, training=labels is not None and not use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(x[:, kept])
        loss = None
        if labels is not None:
            if mask is not None:  # no token is predicted from padding alone
                first = mask & (mask.cumsum(1) == 1)
                labels = labels.masked_fill(first[:, -input_ids.shape[1] :], -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        if use_cache:
            cache.state, cache.length = state, cache.length + input_ids.shape[1]
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

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
            own = zero_state(self.model, 1) if state is None else tuple(part[row : row + 1] for part in state)
            x = self.model.embedding.weight.new_zeros(1, 1, self.model.config["d_model"])
            if real.any():
                x, own = self.model.run_layers(tokens[row : row + 1, real], own, None)
            rows.append((x[:, (real.cumsum(0) - 1).clamp(min=0)], own))
        xs, states = zip(*rows, strict=True)
        return torch.cat(xs), tuple(torch.cat(parts) for parts in zip(*states, strict=True))


def hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokens as a tokenizer of transformers, without special ones.

    Padding has no token of its own: with an attention mask any will do, such as `pad_token_id=0` for `generate`.
    """
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
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(places, []))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


AutoConfig.register(StatemixConfig.model_type, StatemixConfig)
AutoModelForCausalLM.register(StatemixConfig, StatemixForCausalLM)
