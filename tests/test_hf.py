"""hf: transformers' own generation, pipeline and Trainer against ours; padded rows against each alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import TOLERANCE, relative_error
from mixer_helpers import SPECS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from statemix import AutoEncoder, SequenceModel, hf, load_model
from statemix.generate import generate
from statemix.text.tokenizer import Bytes, Characters, train_bpe

MIXERS = {
    "block": {"name": "bd_lru", "num_blocks": 5, "block_size": 3},
    "observer": {"name": "h_lru", "num_channels": 7, "order": 4, "form": "observer"},
    "lstm": {"name": "lstm", "hidden_size": 9},
}
PROMPTS = [[3, 1, 4, 1, 5], [7], [2, 7, 1], [8, 2, 8]]
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def quiet(threads):
    """No progress bars, no advice, and one thread for such small models."""
    threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make_model(
    mixer: str = "block",
    tied: bool = False,
    vocab_size: int = 11,
    kind: type[hf.StatemixPreTrainedModel] = hf.StatemixForCausalLM,
    **options,
):
    torch.manual_seed(0)
    config = hf.StatemixConfig(vocab_size, 20, 2, MIXERS[mixer], tie_word_embeddings=tied, **options)
    model = kind(config).eval()
    with torch.no_grad():
        for mixer_of_layer in model.model.mixers:  # or the newest token would decide alone
            mixer_of_layer.output.weight.mul_(10)
        if kind is hf.StatemixForCausalLM and not tied:
            model.model.head.weight.mul_(2)
    return model


KINDS = [hf.StatemixModel, hf.StatemixForCausalLM, hf.StatemixForSequenceClassification]
each_kind = pytest.mark.parametrize("kind", KINDS)


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    """Rows as a batch and its mask; what pads them are tokens like any other."""
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        missing = length - len(row)
        left = {"left": missing, "right": 0, "both": missing // 2}[side]
        ids.append([6] * left + row + [9] * (missing - left))
        mask.append([0] * left + [1] * len(row) + [0] * (missing - left))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_greedy_text_is_that_of_our_own_generate(mixer, side):
    model = make_model(mixer)
    expected = generate(model.model, PROMPTS, 12, temperature=0)
    assert len({tuple(row) for row in expected}) > 1
    for prompt, row in zip(PROMPTS, expected, strict=True):
        assert model.generate(torch.tensor([prompt]), max_new_tokens=12, **GREEDY)[0, len(prompt) :].tolist() == row
    batch = padded(PROMPTS, side)
    for use_cache in (True, False):
        tokens = model.generate(**batch, max_new_tokens=12, use_cache=use_cache, **GREEDY)
        assert tokens[:, 5:].tolist() == expected


def last_logits(model: hf.StatemixForCausalLM, texts: list[list[int]]) -> Tensor:
    """After each text, (len(texts), V), by the SequenceModel on the whole of it."""
    with torch.no_grad():
        return torch.cat([model.model(torch.tensor([text]))[0][:, -1] for text in texts])


# without a cache, transformers gives the whole text to the model at every token
each_use_cache = pytest.mark.parametrize("use_cache", [True, False])


@each_use_cache
@pytest.mark.parametrize("mixer", MIXERS)
def test_beams_are_the_likeliest_of_a_search_without_any_state(mixer, use_cache):
    model, batch = make_model(mixer), padded(PROMPTS, "left")
    tokens = model.generate(**batch, max_new_tokens=12, num_beams=4, use_cache=use_cache, **GREEDY)
    assert not torch.equal(tokens, model.generate(**batch, max_new_tokens=12, **GREEDY))
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        texts, scores = [prompt], torch.zeros(1)
        for _ in range(12):
            scores, places = (scores[:, None] + last_logits(model, texts).log_softmax(1)).flatten().topk(4)
            texts = [[*texts[place // 11], place % 11] for place in places.tolist()]
        assert row[5:].tolist() == texts[0][-12:]


@each_use_cache
@pytest.mark.parametrize("mixer", MIXERS)
def test_samples_are_those_that_a_seed_draws_without_any_state(mixer, use_cache):
    model, texts = make_model(mixer), [list(prompt) for prompt in PROMPTS]
    torch.manual_seed(1)
    batch, options = padded(PROMPTS, "left"), {"top_k": 6, "top_p": 1.0, "temperature": 0.7, "use_cache": use_cache}
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=True, pad_token_id=0, **options)
    torch.manual_seed(1)
    for _ in range(12):
        scores, places = (last_logits(model, texts) / 0.7).topk(6)
        chances = torch.zeros(4, 11).scatter(1, places, scores.softmax(1))
        texts = [[*text, int(new)] for text, new in zip(texts, chances.multinomial(1), strict=True)]
    assert tokens[:, 5:].tolist() == [text[-12:] for text in texts]


def by_rows(model: hf.StatemixForCausalLM, tokens: Tensor, mask: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    """Logits of the real tokens of each row, and its state, by the SequenceModel in float64."""
    rows = [model.model.double()(row[real][None]) for row, real in zip(tokens, mask.bool(), strict=True)]
    return [(logits[0], [part[0] for part in state]) for logits, state in rows]


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[int(real) for real in row] for row in rows])


MASKS = {
    "left": mask_of("00011111", "11111111", "00000001"),
    "right": mask_of("11111000", "11111111", "10000000"),
    "holes": mask_of("01101101", "11111110", "00100100"),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cut", [None, 3, 7])
def test_padding_leaves_logits_and_state_as_they_are(generator, masks, mixer, cut):
    """Also where the batch is read in two calls, so that padding comes to a state that has begun, or to a whole row."""
    model = make_model(mixer)
    tokens = torch.randint(11, (3, 8), generator=generator)
    mask = MASKS[masks]
    with torch.no_grad():
        out = model(tokens[:, :cut], mask[:, :cut], use_cache=True)
        logits, cache = [out.logits], out.past_key_values
        if cut is not None:
            logits.append(model(tokens[:, cut:], mask, past_key_values=cache).logits)
        logits, expected = torch.cat(logits, dim=1), by_rows(model, tokens, mask)
    assert cache.get_seq_length() == 8
    for row, (wanted, state) in enumerate(expected):
        assert relative_error(logits[row][mask[row].bool()], wanted) <= TOLERANCE[torch.float32]
        for part, wanted_part in zip(cache.state, state, strict=True):
            assert relative_error(part[row], wanted_part) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("masks", MASKS)
def test_the_loss_of_a_padded_batch_is_that_of_its_tokens(generator, masks):
    model = make_model().train()
    tokens = torch.randint(11, (3, 8), generator=generator)
    mask = MASKS[masks]
    out = model(tokens, mask, labels=tokens.masked_fill(mask == 0, -100))
    assert out.past_key_values is None
    out.loss.backward()
    gradient = model.model.embedding.weight.grad.clone()
    model.zero_grad()
    logits = torch.cat([row[:-1] for row, _ in by_rows(model, tokens, mask)])
    following = [row[real][1:] for row, real in zip(tokens, mask.bool(), strict=True)]
    loss = nn.functional.cross_entropy(logits, torch.cat(following))
    loss.backward()
    assert relative_error(out.loss.detach(), loss.detach()) <= TOLERANCE[torch.float32]
    assert relative_error(gradient, model.model.embedding.weight.grad) <= TOLERANCE[torch.float32]


def test_only_the_logits_that_are_asked_for(generator):
    model, tokens = make_model(), torch.randint(11, (2, 6), generator=generator)
    with torch.no_grad():
        whole = model(tokens).logits
        assert torch.equal(model(tokens, logits_to_keep=2).logits, whole[:, -2:])
        assert torch.equal(model(tokens, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
        logits, cache = model(tokens, return_dict=False)
    assert torch.equal(logits, whole)
    assert cache.get_seq_length() == 6


def test_a_conversation_goes_on_from_a_cache():
    model, prompt = make_model(), torch.tensor([PROMPTS[0]])
    first = model.generate(prompt, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, torch.tensor([[2, 7]])], dim=1)
    cache = {hf.CACHE_NAME: first[hf.CACHE_NAME]}
    again = model.generate(longer, max_new_tokens=5, **cache, **GREEDY)
    assert torch.equal(again, model.generate(longer, max_new_tokens=5, **GREEDY))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_forward_takes_the_cache_by_both_its_names(name):
    """Releases below 5.24 say `past_key_values`, 5.24 says `cache`: a name that was ignored would begin anew."""
    model, tokens = make_model(), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        whole = model(tokens).logits
        begun = model(tokens[:, :3], use_cache=True)[hf.CACHE_NAME]
        assert torch.allclose(model(tokens[:, 3:], **{name: begun}).logits, whole[:, 3:], atol=1e-6)
    assert begun.get_seq_length() == 5


TOKENS = torch.tensor([PROMPTS[0]])
UPWARDS = torch.arange(5)[None]
MASK = r"`attention_mask` must have shape \(B, T\) = \(1, 5\), got \("
REFUSED = {
    "a short mask": ({"attention_mask": torch.ones(1, 4)}, ValueError, MASK),
    "a mask of other rows": ({"attention_mask": torch.ones(2, 5)}, ValueError, MASK),
    "a mask of three axes": ({"attention_mask": torch.ones(1, 1, 5)}, ValueError, MASK),
    "a misspelt name": ({"past_key_value": None}, TypeError, r"`past_key_value` is not an argument of `forward`\.$"),
    "both inputs": ({"inputs_embeds": torch.zeros(1, 5, 20)}, ValueError, "one of `input_ids` and .*, got both"),
    "no input": ({"input_ids": None}, ValueError, "one of `input_ids` and `inputs_embeds` must be given, got none"),
    "narrow": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 19)},
        ValueError,
        r"`inputs_embeds` must have shape \(B, T, D\) with D = 20, and the others at least 1, got \(1, 5, 19\)",
    ),
    "no step": ({"input_ids": None, "inputs_embeds": torch.zeros(1, 0, 20)}, ValueError, r"got \(1, 0, 20\)"),
    "tokens as embeddings": (
        {"input_ids": None, "inputs_embeds": TOKENS},
        TypeError,
        "`inputs_embeds` must have a floating-point dtype",
    ),
    "of 64 bits": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 20, dtype=torch.float64)},
        TypeError,
        "`inputs_embeds` must be torch.float32 like the parameters, got torch.float64",
    ),
    "kinds of tokens": ({"token_type_ids": TOKENS}, TypeError, "`token_type_ids` is not an argument"),
    "attentions": ({"output_attentions": True}, ValueError, "`output_attentions` must be False"),
    "another cache": ({"cache": [1]}, TypeError, "`cache` must be a StateCache, got list"),
    "two caches": ({"cache": hf.StateCache(), "past_key_values": hf.StateCache()}, TypeError, "are one argument"),
    "a place": ({"cache_position": torch.arange(2, 7)}, ValueError, "begin with the 0 tokens that .* read, got 2"),
    "packed": ({"position_ids": UPWARDS % 3}, ValueError, r"go up by one .* got a step of -2 in row 0\. Packed"),
    "positions": ({"position_ids": UPWARDS[:, 1:]}, ValueError, r"shape \(B, T\) = \(1, 5\), got \(1, 4\)"),
}


@each_kind
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused(case, kind):
    keywords, error, message = REFUSED[case]
    with pytest.raises(error, match=rf"^{kind.__name__}: .*{message}"):
        make_model(kind=kind)(**{"input_ids": TOKENS} | keywords)


def test_what_changes_nothing_is_taken():
    model = make_model()
    with torch.no_grad():
        plain = model(TOKENS).logits
        nothing = {"output_attentions": False, "output_hidden_states": False, "inputs_embeds": None}
        where = {"position_ids": UPWARDS + 7, "cache_position": torch.arange(5)}
        assert torch.equal(model(TOKENS, **nothing, **where).logits, plain)


def streams(model: hf.StatemixPreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """The embedding and what each layer makes of it, of the last one normalised: by a loop."""
    found = [model.model.embedding(tokens)]
    for layer in model.model.layers:
        found.append(layer(found[-1], None, None)[0])
    return [*found[:-1], model.model.norm(found[-1])]


@each_kind
@pytest.mark.parametrize("masks", ["none", *MASKS])
@pytest.mark.parametrize("how", ["asked", "config", "tuple"])
def test_hidden_states_are_what_the_layers_read_and_make(generator, kind, masks, how):
    model, tokens = make_model(kind=kind), torch.randint(11, (3, 8), generator=generator)
    mask = MASKS.get(masks, torch.ones(3, 8, dtype=torch.int64))
    model.config.output_hidden_states = how == "config"
    with torch.no_grad():
        out = model(
            tokens,
            None if masks == "none" and kind is not hf.StatemixForSequenceClassification else mask,
            output_hidden_states=None if how == "config" else True,
            return_dict=how != "tuple",
        )
        hidden = out[-1] if how == "tuple" else out.hidden_states
        for row, real in enumerate(mask.bool()):
            for ours, theirs in zip(hidden, streams(model, tokens[row : row + 1, real]), strict=True):
                assert torch.allclose(ours[row, real], theirs[0], atol=1e-6)
        assert not any(layer._forward_pre_hooks for layer in model.model.layers)
        model.config.output_hidden_states = False
        assert getattr(model(tokens, mask), "hidden_states", None) is None


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_base_model_is_the_layers_alone(generator, tmp_path, mixer):
    """From a folder of a model with a head, saved and loaded again, and in two calls with a cache."""
    whole = make_model(mixer)
    whole.save_pretrained(tmp_path / "whole")
    model = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "base")
    same = transformers.AutoModel.from_pretrained(tmp_path / "base")
    ours = SequenceModel(11, 20, 2, MIXERS[mixer])
    ours.save(tmp_path)
    for base in (model, same, hf.StatemixModel.from_statemix(tmp_path)):
        assert type(base) is hf.StatemixModel
        assert {name.split(".")[1] for name in base.state_dict()} == {"embedding", "layers", "norm"}
    tokens = torch.randint(11, (3, 8), generator=generator)
    with torch.no_grad():
        expected = whole.model.run_layers(tokens, None, None)[0]
        first = same(tokens[:, :5])
        cache = {hf.CACHE_NAME: first[hf.CACHE_NAME]}
        second = same(tokens[:, 5:], **cache)
        parts = [first.last_hidden_state, second.last_hidden_state]
        assert torch.equal(same(tokens).last_hidden_state, expected)
        assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-6)
        head = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(head.model.run_layers(tokens, None, None)[0], expected)
    assert head.model.head.weight.isfinite().all()


@each_kind
@pytest.mark.parametrize("masks", MASKS)
def test_embeddings_give_what_their_tokens_give(generator, kind, masks):
    """With gradients; and what is at padding has no part in anything, be it NaN."""
    model, tokens = make_model(kind=kind), torch.randint(11, (3, 8), generator=generator)
    mask = MASKS[masks]
    embedded = model.get_input_embeddings()(tokens).detach()
    embedded = embedded.masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
    found = []
    for given in ({"input_ids": tokens}, {"inputs_embeds": embedded}):
        model.zero_grad()
        y = model(**given, attention_mask=mask)[0]
        y = y if kind is hf.StatemixForSequenceClassification else y[mask == 1]
        y.square().sum().backward()
        found.append((y.detach(), model.model.layers[0].mlp.output.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(embedded.grad[mask == 0], torch.zeros(int((mask == 0).sum()), 20))
    assert embedded.grad[mask == 1].abs().sum(1).gt(0).any()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_goes_on_from_embeddings(mixer, side):
    model = make_model(mixer)
    batch = padded(PROMPTS, side)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    tokens = model.generate(inputs_embeds=embedded, attention_mask=batch["attention_mask"], max_new_tokens=12, **GREEDY)
    assert tokens[:, -12:].tolist() == generate(model.model, PROMPTS, 12, temperature=0)


def test_assisted_generation_is_refused():
    """By transformers where the model is to check what another wrote, and by the cache where it is the assistant."""
    model = make_model()
    for helper in ({"assistant_model": make_model("lstm")}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(TOKENS, max_new_tokens=6, **helper, **GREEDY)
    options = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    with pytest.raises(RuntimeError, match=r"^StateCache: a recurrent state cannot be cropped, got crop\(-?\d+\)"):
        other.generate(TOKENS, max_new_tokens=12, assistant_model=model, do_sample=False)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_and_from_pretrained(tmp_path, mixer, tied, dtype):
    model = make_model(mixer, tied).to(dtype)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    same = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(same) is hf.StatemixForCausalLM
    assert same.model.config == model.model.config
    assert same.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight), name
    assert (same.model.head.weight is same.model.embedding.weight) is tied
    with torch.no_grad():
        tokens = torch.tensor([PROMPTS[0]])
        assert torch.equal(same(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tied", [False, True])
def test_from_and_to_our_own_checkpoints(tmp_path, mixer, tied):
    ours = SequenceModel(11, 20, 2, MIXERS[mixer], mlp_size=33, tied_embedding=tied, init_std=0.02, dropout=0.5)
    for folder in ("run/step-5", "back"):
        (tmp_path / folder).mkdir(parents=True)
    ours.save(tmp_path / "run" / "step-5")
    (tmp_path / "run" / "checkpoints.json").write_text(json.dumps({"best": "step-5", "last": "step-5"}))
    model = hf.StatemixForCausalLM.from_statemix(tmp_path / "run")
    assert not any(p.is_meta for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)  # without dropout
    model.save_pretrained(tmp_path / "hf")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_statemix(tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert back.config == ours.config
    assert all(map(torch.equal, back.state_dict().values(), ours.state_dict().values()))
    AutoEncoder(11, 20, 1, MIXERS[mixer], seq_len=4).save(tmp_path / "back")
    with pytest.raises(ValueError, match=r"^SequenceModel\.load: '.*' is of the kind 'AutoEncoder'"):
        hf.StatemixForCausalLM.from_statemix(tmp_path / "back")


def test_first_weights_are_those_of_a_sequence_model():
    """And not what transformers draws."""
    torch.manual_seed(3)
    ours = SequenceModel(11, 20, 2, MIXERS["block"])
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(hf.StatemixConfig(11, 20, 2, MIXERS["block"]))
    assert all(map(torch.equal, model.model.state_dict().values(), ours.state_dict().values()))


def test_a_vocabulary_is_resized(tmp_path):
    model = make_model()
    before = model.model.embedding.weight.detach().clone()
    model.resize_token_embeddings(14, mean_resizing=False)
    assert model(torch.tensor([[13, 1]])).logits.shape == (1, 2, 14)
    assert torch.equal(model.model.embedding.weight[:11], before)
    model.save_statemix(tmp_path)
    assert load_model(tmp_path).config["vocab_size"] == 14


@pytest.mark.parametrize("mixer", ["block", "lstm", "lru", "mamba2"])
def test_what_a_checkpoint_lacks_is_drawn_as_the_constructor_does(tmp_path, mixer):
    """New rows of a larger vocabulary, and a mixer's own set-up: LRU's ring, Mamba-2's decays, an LSTM's matrices."""
    options = {"lru": {"num_channels": 8}, "mamba2": {"head_dim": 8}}
    spec = MIXERS[mixer] if mixer in MIXERS else {"name": mixer, **options[mixer]}
    torch.manual_seed(0)
    hf.StatemixForCausalLM(hf.StatemixConfig(11, 20, 2, spec)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".mixer." not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    junk = [torch.full((200, 64), 7e8) for _ in range(50)]  # what freed memory may hold
    del junk
    torch.manual_seed(3)
    same = {"vocab_size": 30, "ignore_mismatched_sizes": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **same)
    torch.manual_seed(3)
    drawn = SequenceModel(30, 20, 2, spec).state_dict()
    for name, tensor in model.model.state_dict().items():
        fresh = ".mixer." in name or name in ("embedding.weight", "head.weight")
        assert torch.equal(tensor, drawn[name] if fresh else kept[f"model.{name}"]), name


def test_a_folder_opens_where_statemix_hf_was_never_imported(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    code = """
import sys, transformers, torch
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist())
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == model.generate(TOKENS, max_new_tokens=6, **GREEDY)[0].tolist()


def test_bytes_are_padded_without_being_told():
    tokenizer = hf.hf_tokenizer(Bytes())
    assert (tokenizer.pad_token_id, tokenizer("ÿ")["input_ids"]) == (255, [0xC3, 0xBF])


@pytest.mark.parametrize(
    ("ours", "texts"), [(Bytes(), ["a longer one", "b"]), (Characters("\n abcdefghi"), ["bad cafe"])], ids=type
)
def test_the_pipeline_writes_what_generate_does(ours, texts):
    model, tokenizer = make_model(vocab_size=ours.vocab_size), hf.hf_tokenizer(ours)
    options = {"model": model, "tokenizer": tokenizer, "device": "cpu", "batch_size": len(texts)}
    answers = transformers.pipeline("text-generation", **options)(texts, max_new_tokens=15, do_sample=False)
    for text, [answer] in zip(texts, answers, strict=True):
        [new] = generate(model.model, [ours.encode(text)], 15, temperature=0)
        assert answer["generated_text"] == text + tokenizer.decode(new, skip_special_tokens=True)


TEXT = "Grüße, «日本»\n\t x  y😀 it's"


OURS = {
    "bytes": Bytes,
    "characters": lambda: Characters("".join(sorted(set(TEXT)))),
    "bpe": lambda: train_bpe([TEXT * 3, "it's his"], 270),
}


@pytest.mark.parametrize("kind", OURS)
def test_tokens_are_those_of_our_own_tokenizers(kind):
    ours = OURS[kind]()
    theirs = hf.hf_tokenizer(ours)
    assert len(theirs) == ours.vocab_size
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT).tolist()
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT


ROWS = [[(start + 3 * t) % 11 for t in range(5 + start)] for start in range(11)]
EXAMPLES = [{key: value[0] for key, value in padded([row], "right").items()} for row in ROWS]


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = padded([example["input_ids"].tolist() for example in examples], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # nothing predicts it, and yet the Trainer of early releases would count it
    return batch | {"labels": labels}


def make_trainer(model: nn.Module, folder: Path, batch_size: int, **options) -> transformers.Trainer:
    options |= {"learning_rate": 1e-2, "logging_steps": 1000, "report_to": [], "disable_tqdm": True}
    options |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
    options |= {"use_cpu": True, "dataloader_pin_memory": False}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    return transformers.Trainer(model, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES, data_collator=collate)


def test_the_trainer_trains(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path, batch_size=11, max_steps=60, save_steps=60)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.5 < 2 < before
    same = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-60")
    assert all(map(torch.equal, same.state_dict().values(), model.state_dict().values()))
    batch = collate(EXAMPLES)
    logits = model.eval()(**batch).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten())
    assert after == pytest.approx(loss.item(), rel=1e-4)


def test_a_trainer_that_goes_on_ends_as_one_that_was_never_stopped(tmp_path):
    """Bit for bit, and from other first weights, so that all comes from the checkpoint."""
    whole, resumed = make_model(), make_model()
    nn.init.normal_(resumed.model.embedding.weight)
    make_trainer(whole, tmp_path, batch_size=3, max_steps=6, save_steps=4).train()
    trainer = make_trainer(resumed, tmp_path, batch_size=3, max_steps=6, save_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 6
    stopped = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
        assert not torch.equal(stopped[name], weight), name


# classification


def classifier(**options) -> hf.StatemixForSequenceClassification:
    return make_model(kind=hf.StatemixForSequenceClassification, **options)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_row_is_classified_by_its_last_token(generator, mixer, masks, use_cache):
    model, tokens = classifier(mixer=mixer, num_labels=3), torch.randint(11, (3, 8), generator=generator)
    mask = MASKS[masks]
    with torch.no_grad():
        logits = model(tokens, mask, use_cache=use_cache).logits
        padded_by_token = tokens.masked_fill(mask == 0, 10).masked_fill((mask == 1) & (tokens == 10), 0)
        by_mask = model(padded_by_token, mask).logits
        model.config.pad_token_id = 10
        assert torch.equal(model(padded_by_token).logits, by_mask)
        for row, real in zip(tokens, mask.bool(), strict=True):
            x, _ = model.double().model.run_layers(row[real][None], None, None)
            assert relative_error(logits[:1], model.score(x[:, -1])) <= TOLERANCE[torch.float32]
            logits = logits[1:]


LOSSES = {  # num_labels and problem_type, labels of two rows, and the loss of logits (2, num_labels)
    "classes": (3, None, torch.tensor([2, 0]), nn.functional.cross_entropy),
    "many of them": (3, None, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), nn.functional.binary_cross_entropy_with_logits),
    "a number": (1, None, torch.tensor([0.5, -2]), lambda y, labels: nn.functional.mse_loss(y[:, 0], labels)),
    "numbers": (2, "regression", torch.tensor([[0.5, -2], [1, 0]]), nn.functional.mse_loss),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_of_classification_and_regression(case):
    labels_of, problem, labels, loss_of = LOSSES[case]
    model = classifier(num_labels=labels_of, problem_type=problem)
    out = model(**padded([[3, 1, 4], [2]], "right"), labels=labels)
    assert out.logits.shape == (2, labels_of)
    assert out.loss.item() == pytest.approx(loss_of(out.logits.detach(), labels).item())
    out.loss.backward()
    assert model.model.embedding.weight.grad[[3, 1, 4, 2]].abs().sum(1).gt(0).all()
    assert not model.model.embedding.weight.grad[[6, 9]].any()  # what pads


def test_rows_without_an_end_are_refused():
    model, two = classifier(), torch.zeros(2, 5, dtype=torch.int64)
    message = r"^Statemix.*Classification: `attention_mask` must say where each row ends"
    for given in ({"input_ids": two}, {"inputs_embeds": torch.zeros(2, 5, 20)}):
        with pytest.raises(ValueError, match=message):
            model(**given)
    assert model(TOKENS).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"each row must have a token that is not padding, got none in row 1\.$"):
        model(two, torch.tensor([[1] * 5, [0] * 5]))


@pytest.mark.parametrize("init_std", [None, 0.02])
def test_a_classifier_begins_with_the_layers_of_a_text_model(tmp_path, init_std):
    whole = make_model(init_std=init_std)
    whole.save_pretrained(tmp_path / "whole")
    whole.save_statemix(tmp_path)
    torch.manual_seed(3)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=5)
    for model in (loaded, hf.StatemixForSequenceClassification.from_statemix(tmp_path, num_labels=5)):
        assert not any(part.is_meta for part in model.parameters())
        for name, weight in model.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name]), name
        assert model.score.weight.shape == (5, 20)
        assert 0 < model.score.weight.std() < (0.04 if init_std else 0.3)
    loaded.save_pretrained(tmp_path / "saved")
    same = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, same.state_dict().values(), loaded.state_dict().values()))


def collate_classes(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = padded([example["input_ids"].tolist() for example in examples], "right")
    return batch | {"labels": batch["input_ids"][:, 0] % 2}  # what was read first, steps ago


def test_the_trainer_trains_a_classifier(tmp_path):
    """And with accumulated gradients it makes the same step."""
    model = classifier()
    trainer = make_trainer(model, tmp_path, batch_size=11, max_steps=60, save_steps=60)
    trainer.data_collator = collate_classes
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 < 0.5 < before
    weights = [accumulated(classifier(), "score", tmp_path, parts) for parts in (1, 2)]
    assert not torch.equal(weights[0], classifier().score.weight)
    # transformers 5.2 does not even with a model of its own
    theirs = [accumulated(bert(), "classifier", tmp_path, parts) for parts in (1, 2)]
    assert torch.allclose(*weights, atol=1e-6) == torch.allclose(*theirs, atol=1e-6)
    if not transformers.__version__.startswith("5.2."):
        assert torch.allclose(*weights, atol=1e-6)


def accumulated(model: nn.Module, head: str, out: Path, parts: int) -> Tensor:
    """The weight of a classifier's head after one step of SGD on four rows, in so many parts."""
    options = {"max_steps": 1, "gradient_accumulation_steps": parts, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = make_trainer(model, out, batch_size=4 // parts, **options, save_strategy="no")
    trainer.data_collator = collate_classes
    trainer.train()
    weight: Tensor = getattr(model, head).weight.detach()
    return weight


def bert() -> transformers.BertForSequenceClassification:
    """A small classifier of transformers' own, with the loss of ours."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    own = classifier().config
    config = transformers.BertConfig(vocab_size=own.vocab_size, num_labels=own.num_labels, **sizes, **still)
    model = transformers.BertForSequenceClassification(config)
    model.accepts_loss_kwargs = False
    return model


# gradient checkpointing


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, list[Tensor]]:
    """Bytes that autograd keeps from a forward for its backward, but what a layer reads; and all gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights), [p.grad for p in model.parameters()]


def switch(model: hf.StatemixPreTrainedModel, on: bool) -> None:
    """Gradient checkpointing, by the name of the release: 5.24 has another one, and warns of this."""
    verb = "enable" if on else "disable"
    new = f"activation_checkpointing_{verb}"
    getattr(model, new if hasattr(model, new) else f"gradient_checkpointing_{verb}")()


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpointed_gradients_are_the_same_and_need_less(kind, mixer):
    model, rows = make_model(mixer, kind=kind).train(), [[(3 * t) % 11 for t in range(60)] for _ in range(4)]
    batch = padded(rows, "right")
    batch["labels"] = batch["input_ids"] if kind is hf.StatemixForCausalLM else torch.tensor([0, 1, 1, 0])
    whole, expected = saved_bytes(model, batch)
    switch(model, on=True)
    less, found = saved_bytes(model, batch)
    stream = 4 * 60 * 20 * 4
    assert less + 2 * stream < whole / 2
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs.double()) <= TOLERANCE[torch.float32]
    model.eval()
    assert saved_bytes(model, batch)[0] >= whole  # as elsewhere in transformers, in training alone
    switch(model.train(), on=False)
    assert saved_bytes(model, batch)[0] >= whole


# PEFT

reads_checkpointing = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def linear_maps(model: hf.StatemixPreTrainedModel) -> list[str]:
    return [name for name, part in model.model.layers.named_modules() if isinstance(part, nn.Linear)]


@reads_checkpointing
@pytest.mark.parametrize("mixer", SPECS)
def test_low_rank_adapters_are_in_every_mixer_without_being_told(mixer):
    """PEFT's own defaults for what it knows are in a few maps, too; ours are in all of the size of the stream."""
    torch.manual_seed(0)
    model = hf.StatemixForCausalLM(hf.StatemixConfig(11, 20, 2, SPECS[mixer]))
    wide = {n for n in linear_maps(model) if n.split(".")[-1] in hf.LORA_TARGETS}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False)).eval()
    found = {
        name.partition(".lora_A.")[0] for name, _ in adapted.model.model.layers.named_parameters() if "lora_A" in name
    }
    assert found == wide
    for layer in ("0", "1"):
        assert {f"{layer}.mixer.output", f"{layer}.mlp.output", f"{layer}.mlp.gate_and_input"} < found | {""}
    before = adapted(TOKENS).logits
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(TOKENS).logits, before, atol=1e-4)


@reads_checkpointing
def test_a_classifier_with_adapters_trains_its_head_too():
    adapted = peft.get_peft_model(classifier(), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert any("score" in name for name in trained)
    assert all("score" in name or "lora" in name for name in trained)
    batch = padded([[3, 1, 4], [2]], "left") | {"labels": torch.tensor([0, 1])}
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@reads_checkpointing
@pytest.mark.parametrize("told", [True, False], ids=["every map", "the default"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_low_rank_adapter_changes_the_weights_by_its_product(tmp_path, mixer, told):
    """PEFT's LoRA on every matrix that a kernel could read: text, loss and gradients are those of the sum of both."""
    targets = linear_maps(make_model(mixer))
    assert targets
    options = {"r": 2, "lora_alpha": 6, "target_modules": targets if told else None, "init_lora_weights": False}
    adapted = peft.get_peft_model(make_model(mixer), peft.LoraConfig(**options)).eval()
    merged, parts = make_model(mixer), {}
    for name, part in merged.model.layers.named_modules():
        if name in targets:
            parts[name] = adapted.get_submodule(f"base_model.model.model.layers.{name}")
            down, up = (getattr(parts[name], f"lora_{letter}")["default"].weight for letter in "AB")
            part.weight.data += 3 * up.data @ down.data
    batch = collate(EXAMPLES)
    losses = [model(**batch).loss for model in (adapted, merged)]
    for loss in losses:
        loss.backward()
    assert relative_error(losses[0], losses[1].double()) <= TOLERANCE[torch.float32]
    for name, part in parts.items():
        expected = 3 * merged.model.layers.get_submodule(name).weight.grad @ part.lora_A["default"].weight.T
        assert relative_error(part.lora_B["default"].weight.grad, expected.double()) <= TOLERANCE[torch.float32]
    expected = generate(merged.model, PROMPTS, 12, temperature=0)
    assert expected != generate(make_model(mixer).model, PROMPTS, 12, temperature=0)
    adapted.save_pretrained(tmp_path)
    for model in (adapted, peft.PeftModel.from_pretrained(make_model(mixer), tmp_path), adapted.merge_and_unload()):
        tokens = model.generate(**padded(PROMPTS, "left"), max_new_tokens=12, **GREEDY)
        assert tokens[:, 5:].tolist() == expected


def test_without_transformers_it_says_what_to_install(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('not here')")
    code = "import statemix; import statemix.hf"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "ImportError: statemix.hf: it needs transformers 5 or newer: pip install 'statemix[hf]'." in process.stderr
