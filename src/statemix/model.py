"""SequenceModel and AutoEncoder: embedding, pre-norm residual (mixer, SwiGLU) pairs, head.

Initialisation is one rule for all mixers. The last map of every residual branch, `mixer.output` and `mlp.output`,
starts small enough that the sum of all branches has the same scale at any depth. With `init_std` (0.02 in MAD and in
the paper), the weights of every nn.Linear and nn.Embedding are N(0, init_std^2), and those of the branches' last maps
N(0, init_std^2 / (2 num_layers)): there are 2 num_layers branches. Without it all are as torch or the mixer makes them,
and the last maps are divided by sqrt(num_layers): a model of one pair is left as it is. Neither touches what else a
mixer sets up: biases, the ring of LRU, the decays of Mamba-2, convolutions, the matrices within torch.nn.LSTM and GRU.

Weights are saved as safetensors, the config as JSON.
"""

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from statemix import fused, kernels, records
from statemix.gates import check_dense
from statemix.mixers import Mixer, build_mixer, complete_mixer
from statemix.mixers.base import check_flags, check_sizes
from statemix.mixers.linear_recurrence import RECURRENCE
from statemix.specs import Spec, options

State = tuple[Tensor, ...]  # one (B, M, N) per layer

CONFIG_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"


class SwiGLU(nn.Module):
    """y = W_2 (silu(W_1 x) * W_3 x), without biases. Source: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, d_model: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_and_input = nn.Linear(d_model, 2 * mlp_size, bias=False)
        self.output = nn.Linear(mlp_size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        y: Tensor = self.output(fused.gated(self.gate_and_input(x)))
        return y


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU 16 random bits decide about a number, so the share is a multiple of 2^-16.

    There torch draws a double for each, one after another, on processors other than Intel's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        if not (self.training and self.p and x.is_cpu) or fused.transformed():
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * (kept * x.new_tensor(2**16 / (2**16 - dropped)))


class Layer(nn.Module):
    """x + dropout(mixer(norm(x))), then x + dropout(SwiGLU(norm(x)))."""

    def __init__(self, d_model: int, mixer: Spec, mlp_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.mixer_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.mixer = build_mixer(mixer, d_model)
        self.mlp_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.mlp = SwiGLU(d_model, mlp_size)

    def forward(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> (B, T, D), and the mixer's state."""
        if x.shape[1] == 1 and reset is None and (stepped := self._fused_step(x[:, 0], state)) is not None:
            return stepped[0][:, None], stepped[1]
        mixed, state = self.mixer(self.mixer_norm(x), state, reset)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state

    def step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step, x (B, D) -> (B, D), and the mixer's state. Without gradients, one call of the compiled kernels."""
        if LAYER.plainly_called(self) and (stepped := self._fused_step(x, state)) is not None:
            return stepped
        y, state = self(x[:, None], state, None)
        return y[:, 0], state

    def _fused_step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The step as one call, or None where that does not serve."""
        if (step := LAYER.inputs(self)) is None or step.mixer_norm.dtype != x.dtype:
            return None
        state = fused.step_state(x, state, (len(step.mixer_norm), *step.mixer.state_shape))
        return None if state is None else step(x, state)


def _pair_step(layer: Layer, weights: tuple[Tensor, ...]) -> kernels.PairStep:
    *of_mixer, mixer_norm, mlp_norm, gate_and_input, mlp_output = weights
    return kernels.PairStep(
        mixer=RECURRENCE.arrange(layer.mixer, tuple(of_mixer)),
        mixer_norm=mixer_norm,
        mlp_norm=mlp_norm,
        gate_and_input=gate_and_input,
        mlp_output=mlp_output,
        mixer_epsilon=cast(float, layer.mixer_norm.eps),
        mlp_epsilon=cast(float, layer.mlp_norm.eps),
    )


LAYER = fused.Part(
    Layer,
    parts={
        "mixer": RECURRENCE,
        "mixer_norm": fused.RMS_NORM,
        "mlp_norm": fused.RMS_NORM,
        "mlp": fused.Part(SwiGLU, parts={"gate_and_input": fused.LINEAR, "output": fused.LINEAR}),
        "dropout": fused.Part(
            Dropout,
            settings=["p", "training"],
            allows=lambda dropout: not (dropout.training and dropout.p),
        ),
    },
    arrange=_pair_step,
)


class TokenModel(nn.Module):
    """What both models share: embedding, layers, norm and head, their initialisation, saving and loading."""

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
        super().__init__()
        name = type(self).__name__
        check_sizes(name, vocab_size=vocab_size, d_model=d_model, num_layers=num_layers)
        mlp_size = -(-8 * d_model // 96) * 32 if mlp_size is None else mlp_size
        check_sizes(name, mlp_size=mlp_size)
        check_flags(name, tied_embedding=tied_embedding)
        if init_std is not None and not (type(init_std) in (int, float) and 0 < init_std < math.inf):
            raise ValueError(f"{name}: `init_std` must be a finite number above 0, or None, got {init_std!r}.")
        if not (type(dropout) in (int, float) and 0 <= dropout < 1):
            raise ValueError(f"{name}: `dropout` must be a number in [0, 1), got {dropout!r}.")
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "num_layers": num_layers,
            "mixer": complete_mixer(mixer),
            "mlp_size": mlp_size,
            "tied_embedding": tied_embedding,
            "init_std": init_std,
            "dropout": dropout,
        }
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, mixer, mlp_size, dropout) for _ in range(num_layers))
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tied_embedding:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def _initialise(self) -> None:
        """Apply the rule of the module's docstring; a subclass calls it once all its parts are there."""
        init_std, depth = self.config["init_std"], len(self.layers)
        layers = [cast(Layer, layer) for layer in self.layers]
        branches = [last for layer in layers for last in (layer.mixer.output, layer.mlp.output)]
        if init_std is None:
            for branch in branches:
                branch.weight.div_(math.sqrt(depth))
            return
        stds = {  # by weight: a tied one is drawn once
            module.weight: init_std / math.sqrt(2 * depth) if module in branches else init_std
            for module in self.modules()
            if isinstance(module, nn.Linear | nn.Embedding)
        }
        for weight, std in stds.items():
            nn.init.normal_(weight, std=std)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of each layer, first to last."""
        return [cast(Layer, layer).mixer for layer in self.layers]

    @property
    def state_size(self) -> int:
        """Numbers carried per sequence, over all layers."""
        return sum(mixer.state_size for mixer in self.mixers)

    def num_parameters(self) -> int:
        """Number of trained numbers; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def run_layers(self, tokens: Tensor, state: Sequence[Tensor] | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """Tokens (B, T) to the normalised residual stream (B, T, D) and the state of every layer."""
        self._check(tokens, state)
        if tokens.ndim != 2 or 0 in tokens.shape:
            shape, name = tuple(tokens.shape), type(self).__name__
            raise ValueError(f"{name}: `tokens` must have shape (B, T) with B, T of at least 1, got {shape}.")
        x, states = self._embedded(tokens), []
        for i, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state[i], reset)
            states.append(layer_state)
        return self.norm(x), tuple(states)

    def _check(self, tokens: Tensor, state: Sequence[Tensor] | None) -> None:
        name = type(self).__name__
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name}: `tokens` must be a tensor, got {type(tokens).__name__}.")
        check_dense(name, "tokens", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: `tokens` must be int64 or int32, got {tokens.dtype}.")
        if state is None:
            return
        if not isinstance(state, Sequence):
            raise TypeError(f"{name}: `state` must be a sequence of tensors, got {type(state).__name__}.")
        if len(state) != len(self.layers):
            raise ValueError(f"{name}: `state` must have one tensor per layer = {len(self.layers)}, got {len(state)}.")

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
            self, tokens: Tensor, state: Sequence[Tensor] | None = None, reset: Tensor | None = None
        ) -> tuple[Tensor, State]:
            """See `forward`."""

    def forward(
        self, tokens: Tensor, state: Sequence[Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits and final state of token sequences.

        Args:
            tokens: (B, T) integers in [0, vocab_size).
            state: what an earlier call returned, one (B, M, N) per layer. Zeros if None.
            reset: (B, T) bool. True: every layer's state is zero before that step. Never if None.

        Returns:
            Logits (B, T, vocab_size) and the state after the last step.

        Raises:
            TypeError: tokens are not integers.
            ValueError: a shape is wrong, T = 0, or the state is of another number of layers.
            IndexError: a token is outside the vocabulary.
        """
        x, state = self.run_layers(tokens, state, reset)
        return self.head(x), state

    def step(self, tokens: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, State]:
        """One step: tokens (B,) and a state to logits (B, vocab_size) and the next state."""
        self._check(tokens, state)
        if tokens.ndim != 1 or len(tokens) == 0:
            shape = tuple(tokens.shape)
            raise ValueError(f"SequenceModel.step: `tokens` must have shape (B,) with B of at least 1, got {shape}.")
        ends = (fused.EMBEDDING, self.embedding), (fused.RMS_NORM, self.norm), (fused.LINEAR, self.head)
        # its layers ask for themselves
        plain = all(part.plainly_called(module) for part, module in ((MODEL, self), *ends))
        if torch.is_grad_enabled() or not plain or not fused.undisturbed():
            logits, final_state = self(tokens[:, None], state)
            return logits[:, 0], final_state
        x, states = self._embedded(tokens), []
        for i, layer in enumerate(self.layers):
            x, layer_state = cast(Layer, layer).step(x, None if state is None else state[i])
            states.append(layer_state)
        return self.head(self.norm(x)), tuple(states)


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
    calls=["forward", "run_layers"],
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
