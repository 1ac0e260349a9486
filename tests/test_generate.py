"""generate.py: against the full forward over everything so far, hand-made logits, and each row alone."""

import copy
import io
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, needs_kernels, relative_error
from kernel_helpers import STEPPED

import statemix.generate
from statemix import AutoEncoder, SequenceModel
from statemix.cli import main
from statemix.decoder import Decoder
from statemix.generate import Sampler, generate, load_text_model, read_prompt, stream, stream_text
from statemix.text.tokenizer import Bytes, Characters, save_tokenizer

MIXERS = STEPPED | {
    "lstm": {"name": "lstm", "hidden_size": 9},
    "attention": {"name": "attention", "head_dim": 4, "context": 6, "num_heads": 2},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1], [8, 2, 8, 1, 8]]


def make_model(mixer: str = "block", vocab_size: int = 11, **options) -> SequenceModel:
    """With a sharp head, or everything would be a near tie."""
    torch.manual_seed(0)
    model = SequenceModel(vocab_size, 20, 2, MIXERS[mixer], **options)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The models are so small that a second one only waits."""
    threads(1)


def likeliest_by_forward(model: SequenceModel, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without any state: the whole forward, in float64, anew for every token."""
    tokens = list(prompt)
    for _ in range(count):
        logits, _ = model.double()(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_decoding_is_what_the_forward_gives(mixer):
    actual = generate(make_model(mixer), PROMPTS, 12, temperature=0)
    assert actual == [likeliest_by_forward(make_model(mixer), prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in actual}) > 1  # or any constant would pass


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_row_is_what_its_prompt_gives_alone(mixer):
    model, options = make_model(mixer), {"temperature": 0.8, "top_k": 7, "top_p": 0.9}
    together = generate(model, PROMPTS, 15, seed=5, **options)
    assert together == [generate(model, [p], 15, seed=5 + row, **options)[0] for row, p in enumerate(PROMPTS)]
    assert together != generate(model, PROMPTS, 15, seed=6, **options)
    same = generate(model, [[1]] * 3, 15, **options)
    assert same[0] != same[1] != same[2]


@needs_kernels
@pytest.mark.parametrize("mixer", STEPPED)
@pytest.mark.parametrize("batch", [3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decoder_steps_as_the_model_and_rows_share_no_bit(generator, calls, mixer, batch, dtype):
    model = make_model(mixer).to(dtype)
    state = tuple(
        torch.randn(batch, *m.state_shape, generator=generator, dtype=dtype, requires_grad=True) for m in model.mixers
    )
    before = tuple(part.detach().clone() for part in state)
    torch.nn.init.uniform_(model.norm.weight, 0.5, 2.0)  # or one that is not used would not be seen
    together = Decoder(model, state)
    alone = [Decoder(model, tuple(part[row : row + 1] for part in state)) for row in range(batch)]
    oracle, model64 = tuple(part.double() for part in before), copy.deepcopy(model).double()
    for _ in range(5):
        tokens = torch.randint(11, (batch,), generator=generator)
        logits = together.step(tokens)
        expected, oracle = model64.step(tokens, oracle)
        assert not any(tensor.requires_grad for tensor in (logits, *together.state))
        assert relative_error(logits, expected.detach()) <= TOLERANCE[dtype]
        assert torch.equal(logits, torch.cat([one.step(t[None]) for one, t in zip(alone, tokens, strict=True)]))
        for part, wanted in zip(together.state, oracle, strict=True):
            assert relative_error(part, wanted.detach()) <= TOLERANCE[dtype]
    assert calls.count("statemix_model_step") == 5 * (1 + batch)
    assert all(map(torch.equal, state, before))


@needs_kernels
def test_a_model_whose_end_is_not_the_kernels_steps_by_pairs(calls):
    """What else is not the kernel's is in tests/test_fused.py."""
    hooked, transposed = make_model(), make_model()
    hooked.head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    transposed.head.weight.data = transposed.head.weight.data.T.contiguous().T
    for model in (hooked, transposed):
        calls.clear()
        Decoder(model, batch=2).step(torch.tensor([4, 2]))
        assert calls == ["statemix_pair_step"] * 2


def test_what_a_decoder_gave_is_the_callers_own():
    decoder, tokens = Decoder(make_model(), batch=2), torch.tensor([1, 2])
    logits = decoder.step(tokens)
    given = [logits, *decoder.state]
    kept = [part.clone() for part in given]
    for _ in range(3):
        later = decoder.step(tokens)
    assert all(map(torch.equal, given, kept))
    assert not any(map(torch.equal, (later, *decoder.state), kept))


MOVED = {
    "changed in place": lambda model: [weight.data.mul_(1.5) for weight in model.parameters()],
    "exchanged as data": lambda model: [setattr(weight, "data", 1.5 * weight.data) for weight in model.parameters()],
    "one of them exchanged": lambda model: setattr(model.layers[1].mlp.output.weight, "data", torch.ones(20, 64)),
    "other parameters": lambda model: model.load_state_dict(
        {name: 1.5 * weight for name, weight in model.state_dict().items()}, assign=True
    ),
    "another part": lambda model: model.set_submodule("layers.0.mlp", copy.deepcopy(model.layers[1].mlp)),
    "another layer": lambda model: model.layers.__setitem__(0, copy.deepcopy(model.layers[1])),
    "shared memory": lambda model: model.share_memory(),
    "another dtype": lambda model: model.double(),
    "another dtype and back": lambda model: model.double().float(),
    "a transposed square": lambda model: setattr(
        model.layers[0].mixer.output.weight, "data", model.layers[0].mixer.output.weight.data.T
    ),
    "fewer words": lambda model: setattr(model.head.weight, "data", model.head.weight.data[:7]),
    "a hook": lambda model: model.layers[1].mixer.values.register_forward_hook(lambda module, inputs, y: 2 * y),
    "a hook on the model": lambda model: model.register_forward_hook(lambda module, inputs, y: (2 * y[0], y[1])),
    "a forward of its own": lambda model: setattr(model.layers[0].mlp, "forward", lambda x: 2 * x),
    "another normalization": lambda model: setattr(model.layers[0].mixer, "normalization", "tanh"),
    "another epsilon": lambda model: setattr(model.layers[0].mlp_norm, "eps", 1.0),
    "another class": lambda model: setattr(model.layers[0].mlp_norm, "__class__", torch.nn.Sigmoid),
}


@pytest.mark.parametrize("what", MOVED)
def test_a_decoder_sees_what_happens_to_its_model(what):
    torch.manual_seed(0)
    model = SequenceModel(11, 20, 2, {"name": "bd_lru", "num_blocks": 5, "block_size": 4})  # its output is square
    decoder, tokens = Decoder(model), torch.tensor([4])
    decoder.step(tokens)
    state, before = decoder.state, Decoder(model, decoder.state).step(tokens)
    MOVED[what](model)
    with torch.no_grad():
        expected, _ = copy.deepcopy(model).step(tokens, state)
    actual = decoder.step(tokens)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert relative_error(actual, expected.double()) <= TOLERANCE[torch.float32]
    same = what in ("shared memory", "another dtype", "another dtype and back")
    assert same == (actual.shape == before.shape and relative_error(actual, before.double()) < 1e-3)
    again, _ = model.step(tokens, decoder.state)
    assert relative_error(decoder.step(tokens), again.detach().double()) <= TOLERANCE[torch.float32]


def test_threads_share_the_sequence_of_a_decoder():
    decoder, alone, tokens = Decoder(make_model(), batch=3), Decoder(make_model(), batch=3), torch.tensor([1, 2, 3])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda worker: [decoder.step(tokens) for _ in range(50)], range(8)))
    for _ in range(400):
        alone.step(tokens)
    assert all(map(torch.equal, decoder.state, alone.state))


@pytest.mark.parametrize("mixer", ["block", "lstm"])
def test_a_state_that_does_not_fit_is_not_read(mixer):
    model = make_model(mixer)
    first, second = model.initial_state(3)
    for wrong in ((), (first,), (first, second[:2]), (first, second[:, :, :-1])):
        with pytest.raises(ValueError, match=r"^Decoder: `state` must be of the shapes \[.*\], one \(B, M, N\) per"):
            Decoder(model, wrong)


@pytest.mark.parametrize("mixer", STEPPED)
def test_a_state_in_another_layout(generator, mixer):
    model = make_model(mixer)
    state = tuple(torch.randn(*m.state_shape, 3, generator=generator).movedim(2, 0) for m in model.mixers)
    expected = Decoder(model, tuple(part.contiguous() for part in state)).step(torch.tensor([1, 2, 3]))
    assert torch.equal(Decoder(model, state).step(torch.tensor([1, 2, 3])), expected)


@pytest.mark.parametrize("mixer", ["block", "lstm"])
def test_a_decoder_takes_one_token_of_each_row(mixer):
    decoder = Decoder(make_model(mixer), batch=3)
    for wrong in (torch.tensor([1]), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^Decoder: `tokens` must have shape \(B,\) = \(3,\), got \("):
            decoder.step(wrong)
    state = decoder.state
    for wrong in ([1, 2, 11], [-1, 2, 3]):
        with pytest.raises(IndexError, match=r"^(SequenceModel|step): `tokens` must be in \[0, 11\), got (11|-1)\.$"):
            decoder.step(torch.tensor(wrong))
    assert all(map(torch.equal, decoder.state, state))
    expected = Decoder(make_model(mixer), batch=3).step(torch.tensor([1, 2, 3]))
    assert torch.equal(decoder.step(torch.tensor([1, 0, 2, 0, 3], dtype=torch.int32)[::2]), expected)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 30])
def test_a_prompt_is_read_in_chunks(generator, monkeypatch, mixer, length):
    monkeypatch.setattr(statemix.generate, "CHUNK", 8)
    model = make_model(mixer)
    tokens, lengths = torch.randint(11, (length,), generator=generator), []
    run = model.run_layers
    monkeypatch.setattr(model, "run_layers", lambda x, *others: (lengths.append(x.shape[1]), run(x, *others))[1])
    with torch.no_grad():
        state = read_prompt(model, tokens)
        assert sum(lengths) == length
        assert max(lengths, default=0) <= 8
        if length:
            for part, whole in zip(state, model(tokens[None])[1], strict=True):
                assert relative_error(part, whole.double()) <= TOLERANCE[torch.float32]
        else:
            assert all(not part.any() for part in state)


class Draws:
    """Instead of a random generator: these numbers, one after the other."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = iter(numbers)

    def random(self) -> float:
        return next(self.numbers)


@pytest.mark.parametrize(
    ("options", "borders"),  # of the tokens with shares 1/2, 1/8, 1/4, 1/8: where the sums of what is left end
    [
        ((1.0, None, None), [(0, 0.5), (1, 0.625), (2, 0.875), (3, 1)]),
        ((1.0, 4, 1.0), [(0, 0.5), (1, 0.625), (2, 0.875), (3, 1)]),
        ((0.5, None, None), [(0, 16 / 22), (1, 17 / 22), (2, 21 / 22), (3, 1)]),  # squares: 16, 1, 4, 1
        ((1.0, 1, None), [(0, 1)]),
        ((1.0, 2, None), [(0, 2 / 3), (2, 1)]),
        ((1.0, 3, None), [(0, 0.5), (1, 0.625), (2, 0.875), (3, 1)]),  # the third ties with the fourth
        ((1.0, None, 0.5), [(0, 1)]),
        ((1.0, None, 0.51), [(0, 2 / 3), (2, 1)]),
        ((1.0, None, 0.8), [(0, 4 / 7), (1, 5 / 7), (2, 1)]),  # of those that tie, the first
        ((1.0, 2, 0.6), [(0, 1)]),  # 2/3 of what top_k left
        ((1.0, None, 1e-9), [(0, 1)]),
        ((0, 3, 0.8), [(0, 1)]),
        ((1e-300, None, None), [(0, 1)]),
    ],
)
def test_a_draw_is_where_its_number_falls(options, borders):
    logits = torch.tensor([[0.5, 0.125, 0.25, 0.125]]).log() + 3
    low = 0.0
    for token, high in borders:
        for draw in (low + 1e-6, (low + high) / 2, high - 1e-6):
            assert Sampler(*options)(logits, [Draws(draw)]) == [token]
        low = high
    assert Sampler(*options)(logits.expand(2, 4), [Draws(1 - 2**-53), Draws(0)]) == [borders[-1][0], borders[0][0]]


def test_a_token_without_a_share_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    drawn = [Sampler(1.0, None, None)(logits, [Draws(u)])[0] for u in (0, 0.49, 0.5, 1 - 2**-53)]
    assert drawn == [1, 1, 3, 3]


def test_what_is_drawn_has_the_frequencies_of_the_softmax():
    logits, generator = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.1]]), np.random.default_rng(0)
    count = 20_000
    seen = np.bincount(Sampler(0.7, None, None)(logits.expand(count, 5), [generator] * count), minlength=5)
    shares = (logits[0].double() / 0.7).softmax(0).numpy()
    assert np.abs(seen - count * shares).max() < 5 * math.sqrt(count / 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_no_tokens(bad, temperature):
    with pytest.raises(RuntimeError, match=r"^generate: the model's logits are not finite: its training diverged"):
        Sampler(temperature, None, None)(torch.tensor([[0.0, bad, 1.0]]), [np.random.default_rng(0)])
    model = make_model()
    model.norm.weight.data[3] = bad
    with pytest.raises(RuntimeError, match=r"logits are not finite"):
        generate(model, [[1]], 5, temperature=temperature)


def test_a_row_ends_with_a_stop_token_and_the_others_go_on():
    model = make_model()
    whole = generate(model, PROMPTS, 40, temperature=0)
    stop = whole[0][9]
    wanted = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert generate(model, PROMPTS, 40, temperature=0, stop=[stop]) == wanted
    assert len({len(row) for row in wanted}) > 1
    steps = list(stream(model, PROMPTS, 40, temperature=0, stop=(stop,)))
    assert len(steps) == max(map(len, wanted))
    for row, tokens in zip(wanted, zip(*steps, strict=True), strict=True):
        assert list(tokens) == row + [None] * (len(steps) - len(row))


def test_a_stream_comes_token_by_token_and_leaves_gradients_on(calls):
    tokens = stream(make_model(), [[1, 2]], 10**12, temperature=0)
    early = [row[0] for row in itertools.islice(tokens, 6)]
    assert torch.is_grad_enabled()
    assert early == generate(make_model(), [[1, 2]], 6, temperature=0)[0]


def test_arguments_are_checked_when_the_stream_is_made():
    with pytest.raises(ValueError, match=r"^generate: `prompts\[1\]` must have at least one token, got none\.$"):
        stream(make_model(), [[1], []], 3)


MESSAGES = [  # (arguments of generate, exception, message)
    ({"prompts": []}, ValueError, r"`prompts` must have at least one prompt, got none\."),
    ({"prompts": [3, 4]}, ValueError, r"`prompts\[0\]` must be a sequence of tokens, got 3\."),
    ({"prompts": [[1], [2, 11]]}, ValueError, r"`prompts\[1\]` must be of tokens in \[0, 11\), got 11\."),
    ({"prompts": [[-1, 2]]}, ValueError, r"`prompts\[0\]` must be of tokens in \[0, 11\), got -1\."),
    ({"prompts": 3}, TypeError, r"`prompts` must be a sequence of prompts, got 3\."),
    ({"prompts": "ab"}, TypeError, r"`prompts\[0\]` must be a sequence of int64 tokens, got 'a'\."),
    ({"prompts": [[2**70]]}, TypeError, r"`prompts\[0\]` must be a sequence of int64 tokens, got \[.*"),
    ({"prompts": [[1.5]]}, TypeError, r"`prompts\[0\]` must be of integers, got torch\.float32\."),
    ({"prompts": [[1j]]}, TypeError, r"`prompts\[0\]` must be of integers, got torch\.complex64\."),
    ({"prompts": [torch.tensor([1]).to_sparse()]}, TypeError, r"`prompts\[0\]` must be a dense tensor.*"),
    ({"max_new_tokens": 0}, ValueError, r"`max_new_tokens` must be at least 1, got 0\."),
    ({"max_new_tokens": 2**63}, ValueError, r"`max_new_tokens` must be below 2\^63, got 9.*"),
    ({"max_new_tokens": 2.0}, TypeError, r"`max_new_tokens` must be an int, got 2\.0\."),
    ({"temperature": -0.1}, ValueError, r"`temperature` must be at least 0 and finite, got -0\.1\."),
    ({"temperature": math.nan}, ValueError, r"`temperature` must be at least 0 and finite, got nan\."),
    ({"temperature": 10**400}, ValueError, r"`temperature` must be at least 0 and finite, got 1000.*"),
    ({"temperature": "hot"}, TypeError, r"`temperature` must be a number, got 'hot'\."),
    ({"top_k": 0}, ValueError, r"`top_k` must be at least 1, got 0\."),
    ({"top_k": 2**63}, ValueError, r"`top_k` must be below 2\^63, got 9.*"),
    ({"top_p": 0.0}, ValueError, r"`top_p` must be above 0 and at most 1, got 0\.0\."),
    ({"top_p": 1.01}, ValueError, r"`top_p` must be above 0 and at most 1, got 1\.01\."),
    ({"stop": 3}, TypeError, r"`stop` must be a collection of tokens, got 3\."),
    ({"stop": "5"}, ValueError, r"`stop` must be of tokens in \[0, 11\), got '5'\."),
    ({"stop": [3, 11]}, ValueError, r"`stop` must be of tokens in \[0, 11\), got 11\."),
    ({"seed": -1}, ValueError, r"`seed` must be at least 0, got -1\."),
    ({"seed": 2**64}, ValueError, r"`seed` must be below 2\^63, got 18446744073709551616\."),
]


@pytest.mark.parametrize(("arguments", "exception", "message"), MESSAGES)
def test_wrong_arguments_are_told(arguments, exception, message):
    given = {"prompts": [[1, 2]], "max_new_tokens": 3} | arguments
    with pytest.raises(exception, match=rf"^generate: {message}$"):
        generate(make_model(), **given)


def test_an_autoencoder_has_no_next_token():
    model = AutoEncoder(11, 20, 1, MIXERS["block"], seq_len=4)
    with pytest.raises(TypeError, match=r"^generate: `model` must be a SequenceModel, got AutoEncoder\.$"):
        generate(model, [[1]], 3)


@needs_kernels
def test_a_token_takes_as_much_memory_and_as_many_calls_at_any_position(calls):
    """What can be counted of it, without a clock. 16 KB of logits a token."""
    tokens = stream(make_model(vocab_size=4000), [[1]], 10**9, top_k=50)
    resident, counts = [], []
    for _ in range(4):
        calls.clear()
        for _ in itertools.islice(tokens, 250):
            pass
        counts.append(len(calls))
        resident.append(resident_bytes())
    assert counts == [250] * 4
    assert resident[-1] - resident[0] < 3_000_000  # 12 MB of logits in between


def resident_bytes() -> int:
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * 4096 if file.exists() else 0


# text


def make_run(folder: Path, tokenizer=None, vocab_size: int = 256) -> Path:
    (folder / "step-7").mkdir(parents=True)
    make_model(vocab_size=vocab_size).save(folder / "step-7")
    (folder / "checkpoints.json").write_text(json.dumps({"last": "step-9", "best": "step-7"}))
    save_tokenizer(Bytes() if tokenizer is None else tokenizer, folder)
    return folder


@pytest.fixture
def said(monkeypatch):
    """Let the model say these texts, byte by byte, and return the pieces of each stream."""

    def say(text: str | bytes, stop: tuple[str, ...] = (), count: int | None = None) -> list[str]:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(statemix.generate, "stream", lambda *_, **__: iter([[byte] for byte in data]))
        return list(stream_text(make_model(vocab_size=256), Bytes(), "x", count or len(data), stop=stop))

    return say


def test_a_character_comes_when_its_last_byte_is_there(said):
    assert said("aü日b") == ["a", "", "ü", "", "", "日", "b"]
    assert said("日".encode()[:2] + b"a") == ["", "", "\ufffda"]
    assert said(b"a" + "日".encode()[:2]) == ["a", "", "\ufffd"]  # the end: no more will come


def test_a_text_ends_before_the_first_stop(said):
    assert "".join(said("abcXYdef", stop=("XY",))) == "abc"
    assert said("aXbXY", stop=("XY",)) == ["a", "", "Xb", "", ""]
    assert said("aXXYb", stop=("XY",)) == ["a", "", "X", ""]
    assert "".join(said("one\ntwo\n\nthree", stop=("\n\n", "w!"))) == "one\ntwo"
    assert "".join(said("abcd", stop=("cd", "b"))) == "a"
    assert "".join(said("abX", stop=("XY",))) == "abX"  # begun, but the end came first
    assert "".join(said("aüb", stop=("üb",))) == "a"


def test_text_of_a_run_is_the_text_of_its_tokens(tmp_path):
    run = make_run(tmp_path / "run")
    model, tokenizer = load_text_model(run)
    [tokens] = generate(model, [list(b"hello")], 50, seed=3)
    assert "".join(stream_text(model, tokenizer, "hello", 50, seed=3)) == Bytes().decode(tokens)
    for part, wanted in zip(load_text_model(run / "step-7")[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(part, wanted)


def test_the_command_writes_what_follows_each_prompt(tmp_path, capsys):
    run = make_run(tmp_path / "run", Characters("\n abcdefgh"), vocab_size=10)
    options = ["--max-new-tokens", "30", "--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--seed", "4"]
    assert main(["generate", str(run), "--prompt", "bad", "--prompt", "a cab", *options]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = load_text_model(run)
    given = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 4}
    rows = generate(model, [tokenizer.encode(prompt) for prompt in ("bad", "a cab")], 30, **given)
    assert out == f"bad{tokenizer.decode(rows[0])}\n\na cab{tokenizer.decode(rows[1])}\n"
    assert err.startswith("60 tokens in ")
    assert err.endswith(" tokens/s\n")
    first = tokenizer.decode(rows[0])
    assert main(["generate", str(run / "step-7"), "--prompt", "bad", *options, "--stop", first[3:6]]) == 0
    assert capsys.readouterr().out == f"bad{first[: first.index(first[3:6])]}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "`--prompt` must be given, with a text to go on from"),
        (["--prompt", ""], "`prompt` must have at least one character, got ''"),
        (["--prompt", "abz"], "characters: `text` must be of characters in the vocabulary, got 'z' at position 2"),
        (["--prompt", "a", "--prompt", "z"], "got 'z' at position 0"),
        (["--prompt", "a", "--stop", ""], "`stop` must be of texts of at least one character"),
        (["--prompt", "a", "--temperature", "-1"], "`temperature` must be at least 0"),
        (["--prompt", "a", "--top-p", "2"], "`top_p` must be above 0 and at most 1, got 2.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "`max_new_tokens` must be at least 1"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, options, message):
    run = make_run(tmp_path / "run", Characters("abc"), vocab_size=3)
    assert main(["generate", str(run), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""  # nothing is written before all is checked
    assert message in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "latin-1"])
def test_a_terminal_that_cannot_show_a_character_shows_another(tmp_path, monkeypatch, encoding):
    run = make_run(tmp_path / "run", Characters("aé\N{GRINNING FACE}"), vocab_size=3)
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", shown)
    assert main(["generate", str(run), "--prompt", "é", "--max-new-tokens", "200"]) == 0
    shown.flush()
    text = shown.buffer.getvalue().decode(encoding)
    assert len(text.rstrip("\n")) == 201
    assert set(text.rstrip("\n")) == set("aé?" if encoding != "ascii" else "a?")


def assert_no_text_model(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_text_model(folder)


def test_a_folder_that_is_not_a_run_of_text_is_told(tmp_path):
    no_run = r"must be the folder of a run or of a checkpoint, but has neither checkpoints"
    assert_no_text_model(tmp_path / "nothing", no_run)
    run = make_run(tmp_path / "run")
    (run / "checkpoints.json").write_text("{}")
    assert_no_text_model(run, r"^generate: '.*checkpoints\.json' is damaged: `last` is missing\.$")
    (run / "tokenizer.json").unlink()
    no_tokenizer = r"step-7' is not a run of text: there is no tokenizer\.json\. `statemix train"
    assert_no_text_model(run / "step-7", no_tokenizer)


def test_a_run_whose_parts_are_of_different_texts_is_told(tmp_path):
    run = make_run(tmp_path / "run", Characters("ab"))
    assert_no_text_model(run, r"step-7', of 256 tokens, but is another, characters of 2\.$")
    save_tokenizer(Bytes(), run)
    train = run / "step-7" / "train.json"
    train.write_text(json.dumps({"step": 7, "tokenizer": Bytes().fingerprint}))
    load_text_model(run)
    train.write_text(json.dumps({"step": 7, "tokenizer": Characters("ab").fingerprint}))
    assert_no_text_model(run, r"of 256 tokens, but is another, bytes of 256\.$")
    train.write_text("[")
    assert_no_text_model(run, r"^generate: '.*train\.json' is damaged: it is not JSON at line 1, column 2\.$")
    AutoEncoder(256, 20, 1, MIXERS["block"], seq_len=4).save(run / "step-7")
    assert_no_text_model(run, r"is not a run of text: its model is of the kind AutoEncoder")


def test_a_tokenizer_of_another_model_is_told():
    message = r"tokenizer must be the model's, of 11 tokens, but this one \(bytes\) has 256"
    with pytest.raises(ValueError, match=message):
        stream_text(make_model(), Bytes(), "a", 3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_text_is_without_dropout_in_any_mode(tmp_path, mixer):
    """Greedy text is a function of its prompt: of a model that was loaded, and of one that is being trained."""
    model = make_model(mixer, dropout=0.5)
    model.layers[0].eval()  # a mode of its own, which stays
    expected = generate(copy.deepcopy(model).eval(), [[1, 2, 3]], 20, temperature=0)
    for _ in range(2):
        assert generate(model, [[1, 2, 3]], 20, temperature=0) == expected
    modes = [module.training for module in (model, model.head, *model.layers)]
    assert modes == [True, True, False, True]
    model.save(tmp_path)
    loaded = SequenceModel.load(tmp_path)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(torch.tensor([[1, 2, 3]]))[0], loaded(torch.tensor([[1, 2, 3]]))[0])
