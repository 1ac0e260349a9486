"use strict";

/**
 * A SequenceModel of BD-LRU or H-LRU, a token at a time: what `SequenceModel.step` computes, in plain JavaScript.
 *
 * A mixer is h_t[n] = A_t[n] h_{t-1}[n] + a0_t[n] * v_t[n] in each of its N blocks, y_t = W_o vec(h_t). H-LRU is the same
 * with a companion matrix for A_t, or its transpose ("observer"), and an input to component 0 alone. Weights, gates and
 * states are float32, as they are there, so that what is zero or infinite there is so here; sums are of double precision.
 * Layouts are torch's: a state is (M, N), raw gates are (M, M+1, N) or (M+1, N), the input gate last.
 */
const statemix = (() => {
  const LEAST_SUM = 2 ** -126; // a row with a sum below has weights of zero

  const silu = (z) => z / (1 + Math.exp(-z));
  const ACTIVATIONS = { relu: (z) => Math.max(z, 0), tanh: Math.tanh, silu, linear: (z) => z };

  /** The tensors by their names, of what `statemix.explore` packed. */
  function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.weights), (character) => character.charCodeAt(0));
    const tensors = {};
    for (const [name, [first, size]] of Object.entries(packed.tensors)) {
      tensors[name] = new Float32Array(bytes.buffer, 4 * first, size);
    }
    return { config: packed.config, tensors };
  }

  /** W x + b. */
  function linear(weight, x, bias) {
    const y = new Float64Array(weight.length / x.length);
    for (let i = 0; i < y.length; i++) {
      let sum = bias ? bias[i] : 0;
      for (let j = 0; j < x.length; j++) sum += weight[i * x.length + j] * x[j];
      y[i] = sum;
    }
    return y;
  }

  /** x / sqrt(mean x^2 + epsilon), times the weights. */
  function rmsNorm(x, weight, epsilon) {
    const mean = Math.fround(x.reduce((sum, each) => sum + each * each, 0)) / x.length; // infinite where it is there
    return x.map((each, i) => (each / Math.sqrt(mean + epsilon)) * weight[i]);
  }

  /** The weights of a row of raw gates: see `statemix.gates`. */
  function normalize(row, normalization, floor) {
    if (normalization === "none") return row;
    if (normalization === "softmax" || normalization === "sigmoid") {
      // of sigmoids, the softmax of their logarithms, -ln(1 + exp(-z))
      const logs =
        normalization === "softmax" ? row : row.map((z) => Math.min(z, 0) - Math.log1p(Math.exp(-Math.abs(z))));
      const largest = Math.max(...logs);
      const powers = logs.map((z) => Math.exp(z - largest));
      const sum = powers.reduce((a, b) => a + b, 0);
      return powers.map((power) => power / sum);
    }
    const numerators = row.map(ACTIVATIONS[normalization]);
    const sum = numerators.reduce((a, b) => a + Math.abs(b), 0) + floor * row.length;
    return numerators.map((numerator) => numerator / (sum < LEAST_SUM ? 1 : sum));
  }

  /** Of raw gates, for each block A (M x M, row by row: [i, j] carries old component j to new component i) and a0 (M). */
  function transitions(rawGates, config) {
    const { kind, order, blocks } = config;
    const width = order + 1;
    const rows = kind === "block" ? order : 1;
    return Array.from({ length: blocks }, (_, n) => {
      const transition = new Float32Array(order * order);
      const inputGate = new Float32Array(order);
      for (let i = 0; i < rows; i++) {
        const raw = Array.from({ length: width }, (_, j) => rawGates[(i * width + j) * blocks + n]);
        const weights = normalize(raw, config.normalization, config.floor);
        for (let j = 0; j < order; j++) transition[kind === "observer" ? j * order : i * order + j] = weights[j];
        inputGate[i] = weights[order];
      }
      for (let i = 1; i < order && kind !== "block"; i++) {
        transition[kind === "companion" ? i * order + i - 1 : (i - 1) * order + i] = 1;
      }
      return { transition, inputGate };
    });
  }

  /** A mixer's step: x and its state before to y, the state after, and what each block did. */
  function mix(x, before, weightOf, config) {
    const { order, blocks } = config;
    const projection = weightOf("raw_gates.projection.weight");
    const rawGates = projection
      ? linear(projection, x, weightOf("raw_gates.projection.bias"))
      : weightOf("raw_gates.constant");
    const made = linear(weightOf("values.weight"), x);
    const steps = transitions(rawGates, config);
    const after = new Float32Array(order * blocks);
    const values = new Float64Array(order * blocks); // of H-LRU one for each block, for component 0
    values.set(made);
    steps.forEach(({ transition, inputGate }, n) => {
      for (let i = 0; i < order; i++) {
        let sum = inputGate[i] * values[i * blocks + n];
        for (let j = 0; j < order; j++) sum += transition[i * order + j] * before[j * blocks + n];
        after[i * blocks + n] = sum;
      }
    });
    return { y: linear(weightOf("output.weight"), after), after, values, steps };
  }

  /** The state before the first token: zeros, one array (M, N) for each layer. */
  function start({ config }) {
    return Array.from({ length: config.layers }, () => new Float32Array(config.order * config.blocks));
  }

  /**
   * One step: a token and the states of all layers to logits, the next states, and of each layer what its blocks did:
   * `steps[n]` with transition and inputGate, and `values`, (M, N).
   */
  function step({ config, tensors }, token, states) {
    const width = config.width;
    const add = (x, y) => x.map((each, i) => each + y[i]);
    let x = Float64Array.from(tensors["embedding.weight"].subarray(token * width, (token + 1) * width));
    const layers = states.map((before, layer) => {
      const weightOf = (name) => tensors[`layers.${layer}.${name}`];
      const ofMixer = (name) => weightOf(`mixer.${name}`);
      const mixed = mix(rmsNorm(x, weightOf("mixer_norm.weight"), config.epsilon), before, ofMixer, config);
      x = add(x, mixed.y);
      const seen = rmsNorm(x, weightOf("mlp_norm.weight"), config.epsilon);
      const both = linear(weightOf("mlp.gate_and_input.weight"), seen);
      const [gates, inputs] = [both.subarray(0, both.length / 2), both.subarray(both.length / 2)];
      x = add(x, linear(weightOf("mlp.output.weight"), gates.map((gate, i) => silu(gate) * inputs[i])));
      return { after: mixed.after, values: mixed.values, steps: mixed.steps };
    });
    const head = tensors["head.weight"] ?? tensors["embedding.weight"];
    const logits = linear(head, rmsNorm(x, tensors["norm.weight"], config.epsilon));
    return { logits, states: layers.map(({ after }) => after), layers };
  }

  return { unpack, start, step };
})();
