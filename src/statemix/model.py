"""SequenceModel and AutoEncoder: embedding, the residual pairs of backbone.py, head.

Weights are saved as safetensors, the config as JSON.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from statemix import fused, kernels, records
from statemix.backbone import LAYER, Stack, State
from statemix.gates import check_dense
from statemix.mixers.base import Rows, check_flags, check_mask, check_sizes
from statemix.specs import NotImportedError, Spec, options

# from so many on a first layer's raw gates are a table: of all tokens, and of each
POSITIONS, POSITIONS_PER_TOKEN = 32, 4
CONFIG_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"


class TokenModel(Stack):
    """What both models share: an embedding before the pairs and a head behind them, saving and loading."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        mixer: Spec,
        mlp_size: int | None,
        tied_embedding: bool,
        init_std: float | None,
        dropout: float,
    ) -> None:
        super().__init__(d_model, num_layers, mixer, mlp_size, init_std, dropout)
        name = type(self).__name__
        check_sizes(name, vocab_size=vocab_size)
        check_flags(name, tied_embedding=tied_embedding)
        self.config |= {"vocab_size": vocab_size, "tied_embedding": tied_embedding}
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers, self.norm = self._pairs()
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tied_embedding:
            self.head.weight = self.embedding.weight

    def run_layers(
        self,
        tokens: Tensor,
        state: Sequence[Tensor] | None,
        reset: Tensor | None,
        where: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Tokens (B, T) to the normalised residual stream (B, T, D), or (K, D), and the state of every layer."""
        self._check(tokens, state)
        if tokens.ndim != 2 or 0 in tokens.shape:
            shape, name = tuple(tokens.shape), type(self).__name__
            raise ValueError(f"{name}: `tokens` must have shape (B, T) with B, T of at least 1, got {shape}.")
        if where is None:
            return self.run_stack(self._embedded(tokens), state, reset, self._rows(tokens))
        check_mask(type(self).__name__, "where", where, tokens.shape, tokens.device)
        x, state = self.run_stack(self._embedded(tokens), state, reset, self._rows(tokens), where)
        return x[0], state

    def _rows(self, tokens: Tensor) -> Rows | None:
        """What the first pair reads as rows of the embedding, where that saves time and changes nothing else.

        Where a word has more tokens than there are, what the first mixer makes of a token is made once for each, and
        not at every step: its raw gates are most of its work, and become a table.
        """
        plain = tokens.is_cpu and not self.recompute and not fused.transformed()
        if not plain or tokens.numel() < POSITIONS or type(self)._embedded is not TokenModel._embedded:
            return None
        plain = fused.EMBEDDING.plainly_called(self.embedding) and fused.EMBEDDING.reads(self.embedding)
        if not plain or not self._all_layers()[0].shares_rows(tokens.numel()):
            return None
        used, places = tokens.unique(return_inverse=True)
        return Rows(self.embedding(used), places) if tokens.numel() >= POSITIONS_PER_TOKEN * len(used) else None

    def _check(self, tokens: Tensor, state: Sequence[Tensor] | None) -> None:
        name = type(self).__name__
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name}: `tokens` must be a tensor, got {type(tokens).__name__}.")
        check_dense(name, "tokens", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: `tokens` must be int64 or int32, got {tokens.dtype}.")
        self._check_state(state)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """The rows of the embedding. Raises IndexError on a CPU if there is no such row; a GPU says so by itself."""
        try:
            rows: Tensor = self.embedding(tokens)
        except IndexError as error:
            size = self.config["vocab_size"]
            [wrong, *_] = tokens[(tokens < 0) | (tokens >= size)].tolist()
            raise IndexError(f"{type(self).__name__}: `tokens` must be in [0, {size}), got {wrong}.") from error
        return rows

    def save(self, folder: str | Path) -> None:
        """Write model.json and model.safetensors into an existing folder."""
        folder = Path(folder)
        config = {"kind": type(self).__name__} | self.config
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (folder / WEIGHTS_FILE).write_bytes(save({name: w.contiguous() for name, w in self._own_weights().items()}))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The model that `save` wrote, on the CPU, in the dtype it had, in eval mode: without dropout.

        Raises:
            ValueError: a file is missing, truncated, or of another model; the message names it.
        """
        path = Path(folder) / CONFIG_FILE
        kind, config = _read_config(f"{cls.__name__}.load", path)
        if kind != cls.__name__:
            raise ValueError(f"{cls.__name__}.load: '{path}' is of the kind {kind!r}. Use load_model.")
        weights = read_tensors(Path(folder) / WEIGHTS_FILE, f"{cls.__name__}.load")
        try:
            _check_options(cls, config, weights)
            with torch.device("meta"):  # sizes that are not those of the weights cost nothing
                form = cls(**config)
        except NotImportedError as error:
            raise NotImportedError(f"{cls.__name__}.load: '{path}' needs a module. {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{cls.__name__}.load: '{path}' is not a model config: {error}") from error
        except RuntimeError as error:  # torch's own, of sizes whose product it cannot count
            raise ValueError(f"{cls.__name__}.load: '{path}' is not a model config: it is too large.") from error
        form._check_weights(weights, Path(folder) / WEIGHTS_FILE)
        with torch.random.fork_rng(devices=[]):  # the first weights are drawn in vain
            model = cls(**config)
        if "embedding.weight" in weights:
            model.to(weights["embedding.weight"].dtype)
        model.load_weights(folder)
        return model.eval()

    def load_weights(self, folder: str | Path) -> None:
        """Fill this model with the weights that `save` wrote into the folder.

        Raises:
            ValueError: the file is missing, truncated, or of another model; this model is then unchanged.
        """
        path = Path(folder) / WEIGHTS_FILE
        weights = read_tensors(path, type(self).__name__)
        if not (config := Path(folder) / CONFIG_FILE).exists():
            raise ValueError(f"{type(self).__name__}: '{config}' is missing.")
        self._check_weights(weights, path)
        self.load_state_dict(weights, strict=False)  # a tied head is not in the file; all else was just checked

    def _check_weights(self, weights: dict[str, Tensor], path: Path) -> None:
        """Raise ValueError, naming the file, unless weights are of this model's names and shapes."""
        name, own = type(self).__name__, self._own_weights()
        for key in sorted(own.keys() | weights.keys()):
            mine, theirs = own.get(key), weights.get(key)
            if mine is None or theirs is None or mine.shape != theirs.shape:
                wanted, got = (None if w is None else tuple(w.shape) for w in (mine, theirs))
                raise ValueError(f"{name}: '{path}' is of another model: `{key}` must have shape {wanted}, got {got}.")

    def _own_weights(self) -> dict[str, Tensor]:
        """All tensors to save: a tied head is the embedding."""
        return {
            k: w for k, w in self.state_dict().items() if not (self.config["tied_embedding"] and k == "head.weight")
        }


class SequenceModel(TokenModel):
    """Token sequences to logits of the next token or of a target, with a state of constant size.

    Args:
        vocab_size: number of tokens.
        d_model: D, width of the residual stream.
        num_layers: number of (mixer, SwiGLU) pairs.
        mixer: a spec such as {"name": "bd_lru", "num_blocks": 16, "block_size": 3}; names in `MIXERS`.
        mlp_size: inner width of the SwiGLU. None: 8/3 D, rounded up to a multiple of 32.
        tied_embedding: True: the head is the transposed embedding.
        init_std: of the first weights, see the module's docstring. None: torch's defaults.
        dropout: share of the numbers of each residual branch that are dropped in training, in [0, 1).

    Raises:
        TypeError, ValueError: a size is not a positive int, or the mixer spec is wrong.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        mixer: Spec,
        *,
        mlp_size: int | None = None,
        tied_embedding: bool = False,
        init_std: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, d_model, num_layers, mixer, mlp_size, tied_embedding, init_std, dropout)
        self._initialise()

    if TYPE_CHECKING:  # torch says of no call what it returns

        def __call__(
            self,
            tokens: Tensor,
            state: Sequence[Tensor] | None = None,
            reset: Tensor | None = None,
            where: Tensor | None = None,
        ) -> tuple[Tensor, State]:
            """See `forward`."""

    def forward(
        self,
        tokens: Tensor,
        state: Sequence[Tensor] | None = None,
        reset: Tensor | None = None,
        where: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits and final state of token sequences.

        Args:
            tokens: (B, T) integers in [0, vocab_size).
            state: what an earlier call returned, one (B, M, N) per layer. Zeros if None.
            reset: (B, T) bool. True: every layer's state is zero before that step. Never if None.
            where: (B, T) bool, True at the K steps whose logits are wanted: what follows the last mixer is computed
                for them alone. All if None.

        Returns:
            Logits (B, T, vocab_size), or (K, vocab_size), row by row; and the state after the last step.

        Raises:
            TypeError: tokens are not integers.
            ValueError: a shape is wrong, T = 0, or the state is of another number of layers.
            IndexError: a token is outside the vocabulary.
        """
        x, state = self.run_layers(tokens, state, reset, where)
        return self.head(x), state

    def step(
        self, tokens: Tensor, state: Sequence[Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step: tokens (B,) and a state to logits (B, vocab_size) and the next state.

        Where reset, (B,) bool, is True, the state is zero before the step.
        """
        self._check(tokens, state)
        if tokens.ndim != 1 or len(tokens) == 0:
            shape = tuple(tokens.shape)
            raise ValueError(f"SequenceModel.step: `tokens` must have shape (B,) with B of at least 1, got {shape}.")
        state = self._kept(state, reset, tokens)
        ends = (fused.EMBEDDING, self.embedding), (fused.RMS_NORM, self.norm), (fused.LINEAR, self.head)
        # its layers ask for themselves
        plain = all(part.plainly_called(module) for part, module in ((MODEL, self), *ends))
        if torch.is_grad_enabled() or not plain or not fused.undisturbed():
            logits, final_state = self(tokens[:, None], state)
            return logits[:, 0], final_state
        x, final_state = self._step_stack(self._embedded(tokens), state)
        return self.head(x), final_state


class ModelInputs(NamedTuple):
    """What a kernel reads of a SequenceModel: its weights, and the epsilon of the last norm."""

    embedding: Tensor
    pairs: list[kernels.PairStep]
    norm: Tensor
    epsilon: float
    head: Tensor


def _model_inputs(model: SequenceModel, weights: tuple[Tensor, ...]) -> ModelInputs:
    embedding, *of_layers, norm, head = weights
    each = len(of_layers) // len(model.layers)
    pairs = [LAYER.arrange(layer, tuple(of_layers[each * i : each * i + each])) for i, layer in enumerate(model.layers)]
    return ModelInputs(embedding, pairs, norm, cast(float, model.norm.eps), head)


MODEL = fused.Part(
    SequenceModel,
    parts={
        "embedding": fused.EMBEDDING,
        "layers": fused.Part(nn.ModuleList, each=LAYER, calls=()),
        "norm": fused.RMS_NORM,
        "head": fused.LINEAR,
    },
    calls=["forward", "run_layers", "run_stack", "_run"],
    arrange=_model_inputs,
)


class AutoEncoder(TokenModel):
    """Logits of all L tokens from what the layers hold at the last one: head(W_2 gelu(W_1 (x_L + p_t) + b_1) + b_2).

    x_L is the normalised residual stream at the last position, p a learned position embedding. MAD's own has fixed
    sinusoids for p and a norm and a GELU after each map of the decoder.

    Args:
        seq_len: L, in tokens: the only length it reads.
        vocab_size, d_model, num_layers, mixer, mlp_size, tied_embedding, init_std, dropout: see `SequenceModel`.

    Raises:
        TypeError, ValueError: as of `SequenceModel`.

    Source: the compression task of Poli et al. 2024 (arXiv 2403.17844).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        mixer: Spec,
        *,
        seq_len: int,
        mlp_size: int | None = None,
        tied_embedding: bool = False,
        init_std: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, d_model, num_layers, mixer, mlp_size, tied_embedding, init_std, dropout)
        check_sizes("AutoEncoder", seq_len=seq_len)
        self.config["seq_len"] = seq_len
        self.positions = nn.Embedding(seq_len, d_model)
        self.decoder = nn.Sequential(nn.Linear(d_model, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        self._initialise()

    if TYPE_CHECKING:

        def __call__(self, tokens: Tensor) -> tuple[Tensor, State]:
            """See `forward`."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, State]:
        """Tokens (B, L) to logits (B, L, vocab_size), and the state after the last token. Raises as `SequenceModel`."""
        x, state = self.run_layers(tokens, None, None)
        if tokens.shape[1] != self.config["seq_len"]:
            wanted, got = self.config["seq_len"], tuple(tokens.shape)
            raise ValueError(f"AutoEncoder: `tokens` must have shape (B, L) with L = {wanted}, got {got}.")
        return self.head(self.decoder(x[:, -1:] + self.positions.weight)), state


def load_model(folder: str | Path) -> SequenceModel | AutoEncoder:
    """The model in a folder, of whatever kind. Raises ValueError as `SequenceModel.load`."""
    kinds: dict[str, type[SequenceModel] | type[AutoEncoder]] = {
        "SequenceModel": SequenceModel,
        "AutoEncoder": AutoEncoder,
    }
    path = Path(folder) / CONFIG_FILE
    kind, _ = _read_config("load_model", path)
    if kind not in kinds:
        raise ValueError(f"load_model: `kind` in '{path}' must be one of {sorted(kinds)}, got {kind!r}.")
    return kinds[kind].load(folder)


def _read_config(owner: str, path: Path) -> tuple[Any, dict[str, Any]]:
    """The kind and the options of a model.json; one without a kind is of a SequenceModel."""
    try:
        config = records.parse(path.read_bytes())
        records.check(config, {"kind?": str})
        return config.pop("kind", "SequenceModel"), config
    except (OSError, ValueError) as error:
        raise ValueError(f"{owner}: '{path}' is not a model config: {error}") from error


def _check_options(cls: type, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raise ValueError unless a config has the constructor's options, and no more layers than there are weights of."""
    known = {option.name: option.default for option in options(cls)}
    if unknown := [key for key in config if key not in known]:
        raise ValueError(f"`{unknown[0]}` is not an option, there are {sorted(known)}")
    if missing := [key for key, value in known.items() if value is inspect.Parameter.empty and key not in config]:
        raise ValueError(f"`{missing[0]}` is missing")
    layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    if isinstance(config["num_layers"], int) and config["num_layers"] > layers:
        raise ValueError(f"`num_layers` must be {layers}, as in {WEIGHTS_FILE}, got {config['num_layers']}")


def read_tensors(path: Path, owner: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError, naming the file, if it is missing or truncated."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{owner}: '{path}' cannot be read: {error}. It is missing or was cut short.") from error
