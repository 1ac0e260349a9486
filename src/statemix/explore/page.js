"use strict";

/** What one sees: a word and a place in it, and of the model's step there the answer, the automaton, and every block. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const model = statemix.unpack(data.model);
  const { order, blocks, layers: layerCount, kind } = model.config;
  const NONE = -1; // in an automaton: no transition, or no output
  const MOST_KEYS = 130; // tokens that have a button
  const MOST_BLOCKS = 24; // of a layer, unless all are asked for
  const MOST_TRAVELLERS = 900; // dots that move at a time
  const RING = 40; // states that fit on a circle
  const ONE_HOT = 0.9; // a weight from which a row counts as a copy
  const BEAT = 1000; // of playing, in milliseconds
  const MOTION = 500;

  const $ = (id) => document.getElementById(id);
  const nameOf = (token) => data.names[token];
  const drawn = data.verified ?? data.automaton;
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  let word = []; // tokens
  let place = 0; // how many of them are read
  let trace = [{ states: statemix.start(model) }]; // after each number of tokens
  let player = null;

  /** An element with attributes, of SVG where a parent is. */
  function make(tag, attributes = {}, parent = null, text = null) {
    const svg = tag === "svg" || parent?.namespaceURI === "http://www.w3.org/2000/svg";
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    parent?.append(element);
    return element;
  }

  // ---- the word

  function setWord(tokens, at = tokens.length) {
    let same = 0; // what is read alike is not computed again
    while (same < tokens.length && same < word.length && tokens[same] === word[same]) same++;
    trace.length = same + 1;
    word = tokens;
    for (const token of word.slice(same)) trace.push(statemix.step(model, token, trace.at(-1).states));
    go(at);
  }

  function go(at, moving = false) {
    const next = Math.min(Math.max(at, 0), word.length);
    const on = moving && next === place + 1;
    place = next;
    render(on);
  }

  function append(tokens) {
    setWord([...word, ...tokens]);
  }

  /** The tokens of a text: names, or numbers where no token has such a name. */
  function parse(text) {
    return text
      .split(/\s+/)
      .filter(Boolean)
      .map((part) => {
        const named = data.names.indexOf(part);
        const token = named >= 0 ? named : /^\d+$/.test(part) ? Number(part) : NaN;
        if (!(token < data.names.length)) throw new RangeError(`There is no token ${part}.`);
        return token;
      });
  }

  /** A word of the task: the tokens that may come, at random; of any token without an automaton. */
  function randomWord(length) {
    const tokens = [];
    let state = data.automaton?.start;
    while (tokens.length < length) {
      const may = data.names.map((_, token) => token);
      const can = data.automaton
        ? may.filter((token) => data.automaton.transitions[state][token] !== NONE)
        : may.filter((token) => token !== data.pad);
      if (!can.length) break;
      const token = can[Math.floor(Math.random() * can.length)];
      tokens.push(token);
      state = data.automaton?.transitions[state][token];
    }
    return tokens;
  }

  // ---- answers

  /** States and outputs of an automaton along the word; a state is null once a token could not come. */
  function walk(automaton) {
    const states = [automaton.start];
    const outputs = [];
    for (const token of word) {
      const before = states.at(-1);
      const after = before === null ? NONE : automaton.transitions[before][token];
      states.push(after === NONE ? null : after);
      outputs.push(after === NONE ? null : automaton.outputs[before][token]);
    }
    return { states, outputs: outputs.map((output) => (output === NONE ? null : output)) };
  }

  /** What the task says after each token, null where it says nothing; without an automaton it knows its examples. */
  function targets() {
    if (data.automaton) return walk(data.automaton).outputs;
    return word.map((_, t) => {
      const read = word.slice(0, t + 1);
      const known = data.examples.find(({ tokens }) => read.every((token, i) => tokens[i] === token));
      return known ? known.targets[t] : null;
    });
  }

  const largest = (logits) => logits.reduce((best, logit, i) => (logit > logits[best] ? i : best), 0);

  function probabilities(logits) {
    const most = logits[largest(logits)];
    const powers = logits.map((logit) => Math.exp(logit - most));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((power) => power / sum);
  }

  function renderTape(wanted) {
    const tape = $("tape");
    tape.replaceChildren();
    if (!word.length) make("li", { class: "empty" }, tape, "Type or press tokens: the word begins here.");
    word.forEach((token, t) => {
      const said = largest(trace[t + 1].logits);
      const verdict = wanted[t] === null ? "" : wanted[t] === said ? "right" : "wrong";
      const item = make("li", {}, tape);
      const answer = `says ${nameOf(said)}${verdict && `, ${verdict}`}`;
      const button = make("button", { class: verdict, "aria-label": `Token ${t + 1}, ${nameOf(token)}; ${answer}` }, item);
      make("span", {}, button, nameOf(token));
      make("small", {}, button, `${verdict === "wrong" ? "✗ " : verdict ? "✓ " : ""}${nameOf(said)}`);
      if (t >= place) button.classList.add("later");
      if (t === place - 1) button.setAttribute("aria-current", "step");
      button.addEventListener("click", () => go(t + 1));
    });
    const here = tape.querySelector("[aria-current]");
    if (here) tape.scrollLeft = here.offsetLeft - tape.clientWidth / 2;
  }

  function renderAnswer(wanted) {
    const said = $("said");
    const likely = $("likely");
    said.replaceChildren();
    likely.replaceChildren();
    const row = (head, text, detail = "", mark = "") => {
      make("dt", {}, said, head);
      const cell = make("dd", { class: mark }, said, text);
      if (detail) make("small", {}, cell, ` ${detail}`);
    };
    $("answer-head").textContent = place ? `After token ${place}, ${nameOf(word[place - 1])}` : "Before the first token";
    if (!place) {
      row("model", "nothing yet", "all states are zero");
      return;
    }
    const shares = probabilities(trace[place].logits);
    const answer = largest(trace[place].logits);
    const target = wanted[place - 1];
    const mark = target === null ? "" : target === answer ? "right" : "wrong";
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    row("model", nameOf(answer), `${percent(shares[answer])}${mark && (mark === "right" ? " ✓ right" : " ✗ wrong")}`, mark);
    if (data.automaton) {
      const gone = walk(data.automaton).states[place] === null;
      row("task", target === null ? "nothing" : nameOf(target), target !== null ? "" : gone ? "this is no word of the task" : "not scored here");
    } else {
      row("task", target === null ? "nothing" : nameOf(target), target === null ? "not scored here, or no word of the list" : "");
    }
    if (data.verified) {
      const { states, outputs } = walk(data.verified);
      const output = outputs[place - 1];
      const where = states[place] === null ? "this is no word of the task" : `in state ${states[place]}`;
      const differs = output !== null && output !== answer;
      const text = output === null ? "nothing" : nameOf(output);
      row("verified automaton", text, differs ? `${where}; not what the model says` : where, differs ? "wrong" : "");
    }
    [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, 6).forEach((token) => {
      const item = make("li", {}, likely);
      make("span", {}, item, nameOf(token));
      make("i", { style: `width: ${100 * shares[token]}%` }, make("span", {}, item));
      make("span", {}, item, percent(shares[token]));
    });
  }

  // ---- the automaton

  const OUTCOMES = {
    equal: "statemix verify: the model is right at every length.",
    differs: "statemix verify: the model is wrong at some words.",
    undecided: "statemix verify: undecided, nothing is claimed.",
  };

  const colorOf = (label) => data.colors[label % data.colors.length];

  function layOut(count) {
    if (count <= RING) {
      const radius = count === 1 ? 0 : 1;
      const size = Math.min(0.15, count === 1 ? 0.15 : 0.75 * Math.sin(Math.PI / count));
      const angles = Array.from({ length: count }, (_, s) => (2 * Math.PI * s) / count - Math.PI / 2);
      return { size, places: angles.map((angle) => [radius * Math.cos(angle), radius * Math.sin(angle)]) };
    }
    const side = Math.ceil(Math.sqrt(count));
    const pitch = 2 / (side - 1);
    const places = Array.from({ length: count }, (_, s) => [-1 + pitch * (s % side), -1 + pitch * Math.floor(s / side)]);
    return { size: 0.36 * pitch, places };
  }

  /** Arrows of an automaton, one from a state to another for all tokens that lead there. */
  function arrows(automaton, from) {
    const tokens = new Map();
    automaton.transitions[from].forEach((to, token) => {
      if (to !== NONE) tokens.set(to, [...(tokens.get(to) ?? []), token]);
    });
    return tokens;
  }

  function short(tokens, most) {
    const names = tokens.slice(0, most).map(nameOf).join(" ");
    return tokens.length > most ? `${names} …` : names;
  }

  function renderGraph() {
    if (!drawn) return;
    const states = drawn.transitions.length;
    const { states: walked } = walk(drawn);
    const [now, was] = [walked[place], place ? walked[place - 1] : null];
    const { size, places } = layOut(states);
    const graph = $("graph");
    graph.setAttribute("viewBox", "-1.3 -1.3 2.6 2.6");
    graph.setAttribute("aria-label", now === null ? "The automaton has left its words" : `The automaton is in state ${now} of ${states}`);
    graph.replaceChildren();
    const curve = (from, to, name, text) => {
      const [[x0, y0], [x1, y1]] = [places[from], places[to]];
      const bend = 0.12;
      const [cx, cy] = [(x0 + x1) / 2 + bend * (y1 - y0), (y0 + y1) / 2 - bend * (x1 - x0)];
      const cut = (x, y) => {
        const length = Math.hypot(cx - x, cy - y) || 1;
        return [x + ((cx - x) * size * 1.15) / length, y + ((cy - y) * size * 1.15) / length];
      };
      const [[ax, ay], [bx, by]] = [cut(x0, y0), cut(x1, y1)];
      make("path", { class: `edge ${name}`, d: `M${ax} ${ay}Q${cx} ${cy} ${bx} ${by}` }, graph);
      const angle = Math.atan2(by - cy, bx - cx);
      const tip = [0.5, -0.5].map((turn) => `${bx - 0.08 * Math.cos(angle + turn)} ${by - 0.08 * Math.sin(angle + turn)}`);
      make("path", { class: `edge ${name}`, d: `M${tip[0]}L${bx} ${by}L${tip[1]}` }, graph);
      if (text) {
        const at = [0.4 * ax + 0.4 * cx + 0.2 * bx, 0.4 * ay + 0.4 * cy + 0.2 * by];
        const attributes = { x: at[0], y: at[1], "font-size": 0.1, "text-anchor": "middle", "dominant-baseline": "central" };
        make("text", { ...attributes, stroke: "var(--paper)", "stroke-width": 0.05, "paint-order": "stroke" }, graph, text);
      }
    };
    const few = states <= 12;
    for (let from = 0; from < states && few; from++) {
      if (from !== now) for (const to of arrows(drawn, from).keys()) if (to !== from) curve(from, to, "");
    }
    if (now !== null && states <= RING) {
      for (const [to, tokens] of arrows(drawn, now)) if (to !== now) curve(now, to, "out", few ? short(tokens, 3) : "");
    }
    if (was !== null && now !== null && was !== now) curve(was, now, "taken");
    places.forEach(([x, y], state) => {
      const here = state === now;
      make("circle", { class: `node${here ? " here" : ""}`, cx: x, cy: y, r: here ? 1.25 * size : size }, graph);
      make("circle", { fill: colorOf(state), "fill-opacity": here ? 1 : 0.35, cx: x, cy: y, r: 0.85 * size }, graph);
      const dark = here ? { style: "fill: #fff; font-weight: 700" } : {};
      const text = { x, y, "font-size": Math.min(0.13, 1.1 * size), "text-anchor": "middle", "dominant-baseline": "central" };
      if (states <= 400) make("text", { ...text, ...dark }, graph, state);
    });
    $("walk-head").textContent = data.verified ? "The verified automaton" : "The task's automaton";
    const parts = [data.outcome ? OUTCOMES[data.outcome] : "It is the task's own: this model has not been verified."];
    if (now === null) parts.push("This is no word of the task.");
    else {
      const from = [...arrows(drawn, now)].slice(0, 8);
      const leads = from.map(([to, tokens]) => `${short(tokens, 4)} ${to !== now ? `to ${to}` : tokens.length > 1 ? "stay" : "stays"}`);
      parts.push(leads.length ? `In state ${now}: ${leads.join(", ")}.` : `In state ${now}, where no token comes.`);
    }
    $("walk-note").textContent = parts.join(" ");
  }

  // ---- the blocks

  /** (M, N), 1 where the read-out has a weight for a component; and of each block the sum of their squares. */
  function readOut(layer) {
    const weight = model.tensors[`layers.${layer}.mixer.output.weight`];
    const squares = new Float64Array(order * blocks);
    weight.forEach((each, i) => (squares[i % squares.length] += each * each));
    const sums = Array.from({ length: blocks }, (_, n) =>
      Array.from({ length: order }, (_, i) => squares[i * blocks + n]).reduce((a, b) => a + b, 0),
    );
    return { squares, sums };
  }

  const INPUT = order + 0.3; // where the column of the input gates begins
  const VALUE = INPUT + 1.5; // x of the inputs' dots
  const NEW = VALUE + 1.2; // of the new state's
  const OLD = -0.6; // y of the old state's

  function makeBlock(parent, n, squares) {
    const figure = make("figure", { class: "block" }, parent);
    const caption = make("figcaption", {}, figure);
    const svg = make("svg", { viewBox: `-0.2 -1.2 ${NEW + 3.4} ${order + 1.4}`, role: "img" }, figure);
    const head = { class: "head", y: OLD, "font-size": 0.54, "text-anchor": "middle", "dominant-baseline": "central" };
    for (const [text, x] of [["in", VALUE], ["new", NEW]]) make("text", { ...head, x }, svg, text);
    make("rect", { class: "frame", x: 0, y: 0, width: order, height: order }, svg);
    make("rect", { class: "frame", x: INPUT, y: 0, width: 1, height: order }, svg);
    const cells = Array.from({ length: order }, (_, i) =>
      Array.from({ length: order + 1 }, (_, j) =>
        make("rect", { x: (j < order ? j : INPUT) + 0.05, y: i + 0.05, width: 0.9, height: 0.9 }, svg),
      ),
    );
    const unread = (i) => (squares[i * blocks + n] ? "" : " unread");
    const dot = (x, y) => make("circle", { cx: x, cy: y }, svg);
    return {
      n,
      figure,
      caption,
      svg,
      cells,
      unread,
      old: Array.from({ length: order }, (_, j) => dot(j + 0.5, OLD)),
      input: Array.from({ length: kind === "block" ? order : 1 }, (_, i) => dot(VALUE, i + 0.5)),
      fresh: Array.from({ length: order }, (_, i) => dot(NEW, i + 0.5)),
      texts: Array.from({ length: order }, (_, i) =>
        make("text", { x: NEW + 0.55, y: i + 0.5, "font-size": 0.58, "dominant-baseline": "central" }, svg),
      ),
    };
  }

  const size = (value, scale) => (value ? 0.1 + 0.32 * Math.min(1, Math.abs(value) / scale) : 0.06);

  function setDot(dot, value, scale, more = "") {
    dot.setAttribute("r", size(value, scale));
    dot.setAttribute("class", `number${value < 0 ? " negative" : ""}${more}`);
  }

  const plain = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(3))));

  /** What rows do, in words: [name, sources]; a source is an old component, order for the input, null where it is mixed. */
  function describe({ transition, inputGate }) {
    const sources = Array.from({ length: order }, (_, i) => {
      const row = [...transition.subarray(i * order, (i + 1) * order), inputGate[i]];
      const best = row.reduce((top, weight, j) => (Math.abs(weight) > Math.abs(row[top]) ? j : top), 0);
      const sum = row.reduce((total, weight) => total + Math.abs(weight), 0);
      return sum > 0 && Math.abs(row[best]) >= ONE_HOT * Math.max(sum, 1) ? best : null;
    });
    const olds = new Set(sources.filter((source) => source !== null && source < order));
    if (sources.includes(null)) return ["mixes", sources];
    if (sources.every((source) => source === order)) return ["writes the input", sources];
    if (sources.every((source, i) => source === i)) return ["keeps", sources];
    if (olds.size === order) return [`permutes ${cycles(sources)}`, sources];
    return ["copies", sources];
  }

  /** Where old components go, as cycles: new i is old sources[i]. */
  function cycles(sources) {
    const goes = sources.map((_, j) => sources.indexOf(j));
    const seen = new Set();
    let text = "";
    for (const first of goes.keys()) {
      const cycle = [];
      for (let at = first; !seen.has(at); at = goes[at]) {
        seen.add(at);
        cycle.push(at);
      }
      if (cycle.length > 1) text += `(${cycle.join(" ")})`;
    }
    return text;
  }

  function updateBlock(block, layer, scale, moving) {
    const { n } = block;
    const of = (array, i) => array[i * blocks + n];
    const after = trace[place].states[layer];
    const before = place ? trace[place - 1].states[layer] : after;
    const step = place ? trace[place].layers[layer] : null;
    const act = step ? describe(step.steps[n]) : null;
    block.caption.replaceChildren();
    make("b", {}, block.caption, `Block ${n}`);
    block.caption.append(act ? ` ${act[0]}` : " at rest");
    const sums = Array.from({ length: order }, (_, i) => plain(of(after, i)));
    const from = act?.[1].map((source, i) => `${i} from ${source === null ? "several" : source === order ? "the input" : `old ${source}`}`);
    block.svg.setAttribute("aria-label", `Block ${n}: state ${sums.join(", ")}${from ? `; ${from.join(", ")}` : ""}`);
    for (let i = 0; i < order; i++) {
      for (let j = 0; j <= order; j++) {
        const weight = !step ? 0 : j < order ? step.steps[n].transition[i * order + j] : step.steps[n].inputGate[i];
        const cell = block.cells[i][j];
        cell.setAttribute("fill-opacity", Math.min(1, Math.abs(weight)).toFixed(3));
        cell.setAttribute("class", weight < 0 ? "cell negative" : "cell");
      }
      setDot(block.old[i], of(before, i), scale, block.unread(i));
      setDot(block.fresh[i], of(after, i), scale, block.unread(i));
      block.texts[i].textContent = sums[i];
      if (block.input[i]) {
        setDot(block.input[i], step ? of(step.values, i) : 0, scale);
        // what a gate keeps out is faint
        block.input[i].setAttribute("opacity", step ? 0.2 + 0.8 * Math.min(1, Math.abs(step.steps[n].inputGate[i])) : 0);
      }
      if (moving) block.fresh[i].animate([{ opacity: 0 }, { opacity: 0, offset: 0.85 }, { opacity: 1 }], MOTION);
    }
    if (moving) travel(block, before, step, scale);
  }

  let travellers = 0;

  /** Dots go from the old components down to their squares and on to the new ones, as those of the inputs do. */
  function travel(block, before, step, scale) {
    const { transition, inputGate } = step.steps[block.n];
    for (let i = 0; i < order; i++) {
      for (let j = 0; j <= order; j++) {
        const weight = j < order ? transition[i * order + j] : inputGate[i];
        const value = weight * (j < order ? before[j * blocks + block.n] : step.values[i * blocks + block.n]);
        if (Math.abs(value) < 0.03 * scale || Math.abs(weight) < 0.03 || travellers >= MOST_TRAVELLERS) continue;
        const dot = make("circle", { r: size(value, scale), class: `number${value < 0 ? " negative" : ""}` }, block.svg);
        const at = (left, top) => ({ transform: `translate(${left}px, ${top}px)` });
        travellers++;
        const path = j < order ? [at(j + 0.5, OLD), at(j + 0.5, i + 0.5)] : [at(VALUE, i + 0.5), at(VALUE, i + 0.5)];
        dot.animate([...path, at(NEW, i + 0.5)], { duration: MOTION, easing: "ease-in-out" }).finished
          .catch(() => {}) // it was taken from the page
          .finally(() => {
            travellers--;
            dot.remove();
          });
      }
    }
  }

  function makePlane(parent, layer) {
    const plane = data.planes[layer];
    if (!plane) {
      make("p", { class: "note" }, parent, "There is no plane of this layer's states: see the guide.");
      return null;
    }
    const figure = make("figure", { class: "plane" }, parent);
    const height = Math.max(0.15, ...plane.points.map(([, y]) => Math.abs(y))) + 0.12; // two labels are on a line
    const svg = make("svg", { viewBox: `-1.12 ${-height} 2.24 ${2 * height}`, role: "img" }, figure);
    svg.setAttribute("aria-label", `States of layer ${layer + 1} in a plane`);
    for (const [x, y, label] of plane.points) make("circle", { cx: x, cy: -y, r: 0.022, fill: colorOf(label), "fill-opacity": 0.6 }, svg);
    const trail = make("polyline", { fill: "none", stroke: "var(--dim)", "stroke-width": 0.012 }, svg);
    const here = make("circle", { r: 0.055, stroke: "var(--ink)", "stroke-width": 0.018 }, svg);
    const what = drawn ? "a colour for each state of the automaton" : "a colour for each target";
    make("figcaption", {}, figure, `States of this layer after words of the task, ${what}, in the plane where these are farthest apart; the ring is the state now.`);
    const project = (state) => plane.directions.map((direction, axis) => {
      const sum = direction.reduce((total, weight, i) => total + weight * state[i], -plane.origin[axis]);
      const edge = axis ? height - 0.06 : 1.06; // what is outside is seen there
      return Math.min(edge, Math.max(-edge, axis ? -sum : sum));
    });
    return { trail, here, project };
  }

  function updatePlane({ trail, here, project }, layer, moving) {
    const past = trace.slice(Math.max(1, place - 6), place + 1).map(({ states }) => project(states[layer]));
    const [x, y] = project(trace[place].states[layer]);
    trail.setAttribute("points", past.map((point) => point.join(",")).join(" "));
    here.setAttribute("cx", x);
    here.setAttribute("cy", y);
    const label = drawn ? walk(drawn).states[place] : (targets()[place - 1] ?? null);
    here.setAttribute("fill", label === null ? "none" : colorOf(label));
    if (moving && past.length > 1) {
      const [px, py] = past.at(-2);
      here.animate([{ transform: `translate(${px - x}px, ${py - y}px)` }, { transform: "none" }], { duration: MOTION, easing: "ease-in-out" });
    }
  }

  const views = [];

  function makeLayers() {
    $("layers").style.setProperty("--card-width", `${7 + order}rem`);
    for (let layer = 0; layer < layerCount; layer++) {
      const section = make("section", { "aria-labelledby": `layer-${layer}` }, $("layers"));
      const head = make("div", { class: "layer-head" }, section);
      make("h2", { id: `layer-${layer}` }, head, `Layer ${layer + 1}: each block's A, and its state`);
      const { squares, sums } = readOut(layer);
      const ranked = [...sums.keys()].filter((n) => sums[n] > 0).sort((a, b) => sums[b] - sums[a] || a - b);
      const chosen = ranked.slice(0, MOST_BLOCKS).sort((a, b) => a - b);
      const grid = make("div", { class: "blocks" });
      const view = { layer, cards: [], plane: null };
      const show = (numbers) => {
        grid.replaceChildren();
        view.cards = numbers.map((n) => makeBlock(grid, n, squares));
      };
      show(chosen);
      if (chosen.length < blocks) {
        const label = make("label", { class: "all" }, head);
        const box = make("input", { type: "checkbox" }, label);
        const rest = ranked.length < blocks ? `${blocks - ranked.length} that nothing reads` : "those read the least";
        label.append(`all ${blocks} blocks, also ${rest}`);
        box.addEventListener("change", () => {
          show(box.checked ? [...sums.keys()] : chosen);
          render(false);
        });
      }
      section.append(grid);
      view.plane = makePlane(section, layer);
      views.push(view);
    }
  }

  function renderLayers(moving) {
    for (const { layer, cards, plane } of views) {
      for (const card of cards) {
        let scale = 0;
        for (const { states } of trace) for (let i = 0; i < order; i++) scale = Math.max(scale, Math.abs(states[layer][i * blocks + card.n]));
        updateBlock(card, layer, scale || 1, moving);
      }
      if (plane) updatePlane(plane, layer, moving);
    }
  }

  // ---- all of it

  function render(moving) {
    const wanted = targets();
    renderTape(wanted);
    renderAnswer(wanted);
    renderGraph();
    renderLayers(moving && !still.matches);
    $("place").textContent = `${place} of ${word.length}`;
    $("first").disabled = $("back").disabled = place === 0;
    $("last").disabled = $("forward").disabled = place === word.length;
    $("play").disabled = $("delete").disabled = $("clear").disabled = !word.length;
    $("trouble").textContent = "";
    history.replaceState(null, "", word.length ? `#${word.join(",")}@${place}` : "#");
  }

  function pause() {
    clearInterval(player);
    player = null;
    $("play").textContent = "Play";
    $("play").setAttribute("aria-pressed", "false");
  }

  function play() {
    if (player !== null) return pause();
    if (!word.length) return undefined;
    if (place === word.length) go(0);
    player = setInterval(() => {
      go(place + 1, true);
      if (place === word.length) pause();
    }, BEAT);
    $("play").textContent = "Pause";
    $("play").setAttribute("aria-pressed", "true");
    return undefined;
  }

  /** By hand: what plays stops. */
  const byHand = (act) => () => {
    pause();
    act();
  };
  const COMMANDS = {
    first: byHand(() => go(0)),
    back: byHand(() => go(place - 1)),
    forward: byHand(() => go(place + 1, true)),
    last: byHand(() => go(word.length)),
    play,
    delete: byHand(() => setWord(word.slice(0, -1))),
    clear: byHand(() => setWord([])),
    random: byHand(() => setWord(randomWord(12), 1)),
  };
  const KEYS = { Home: "first", ArrowLeft: "back", ArrowRight: "forward", End: "last", " ": "play", Backspace: "delete" };

  function listen() {
    for (const [id, act] of Object.entries(COMMANDS)) $(id).addEventListener("click", act);
    document.addEventListener("keydown", (event) => {
      const { target, key } = event;
      if (event.ctrlKey || event.metaKey || event.altKey || target.matches("input[type=text], select")) return;
      if (key === " " && target.matches("button, summary, input")) return; // it presses that
      if (key in KEYS) {
        event.preventDefault();
        COMMANDS[KEYS[key]]();
      } else if (data.names.length <= 10 ? data.names.includes(key) : false) {
        pause();
        append([data.names.indexOf(key)]);
      } else if (/^[\w+\-*()=]$/.test(key)) $("typed").focus(); // what is typed goes there
    });
    $("type").addEventListener("submit", (event) => {
      event.preventDefault();
      pause();
      try {
        const tokens = parse($("typed").value);
        append(tokens);
        $("typed").value = "";
      } catch (error) {
        $("trouble").textContent = `${error.message} They are ${nameOf(0)} to ${nameOf(data.names.length - 1)}, or numbers from 0 to ${data.names.length - 1}.`;
      }
    });
    $("examples").addEventListener("change", () => {
      pause();
      const chosen = $("examples").value;
      if (chosen) setWord(chosen.split(",").map(Number), 1);
    });
  }

  /** The word and the place that the address has after #, if it has some: numbers of tokens, and behind @ the place. */
  function readAddress() {
    const [text, at] = location.hash.slice(1).split("@");
    const tokens = text.split(",").filter(Boolean).map(Number);
    const fits = tokens.every((token) => Number.isInteger(token) && token >= 0 && token < data.names.length);
    if (fits && tokens.length) setWord(tokens, /^\d+$/.test(at) ? Number(at) : tokens.length);
    else setWord(data.examples[0].tokens.slice(0, 12), 1);
    if (!fits) $("trouble").textContent = `Tokens in the address must be numbers from 0 to ${data.names.length - 1}.`;
  }

  function begin() {
    $("about").textContent = data.about;
    $("task").textContent = `The task: ${data.task}.`;
    $("notes").textContent = data.notes.join(" ");
    $("walk").hidden = !drawn;
    if (data.names.length <= MOST_KEYS) {
      data.names.forEach((name, token) => {
        const button = make("button", { type: "button", title: `token ${token}` }, $("keys"), name);
        button.addEventListener("click", byHand(() => append([token])));
      });
    }
    if (data.wrong) make("option", { value: data.wrong }, $("examples"), "a shortest wrong word");
    for (const { tokens } of data.examples) make("option", { value: tokens }, $("examples"), short(tokens, 12));
    makeLayers();
    listen();
    readAddress();
    window.addEventListener("hashchange", byHand(readAddress));
  }

  begin();
})();
