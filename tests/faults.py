"""Faults of the kind that one really makes, each with the tests that are to notice it. mutation.py plants them."""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Fault(NamedTuple):
    """A change of one place in the sources after which something is wrong.

    name: what is wrong then.
    file: from the root of the repository.
    old: text that stands there once.
    new: what takes its place.
    tests: files of tests.
    select: which of them, as pytest's -k.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    select: str


# A paragraph for each file: its path, and of every fault in it the name, the old text (-), the new one (+), which may
# be none, and the tests that are to notice it (?).
TABLE = r"""
src/statemix/gates.py
a row of signed weights is divided by its sum, not by the sum of absolute values
  - numerator.abs().sum(dim, keepdim=True)
  + numerator.sum(dim, keepdim=True)
  ? tests/test_gates.py -k follow_the_formula
the floor of relu is added once, not for every entry
  - keepdim=True) + floor * entries
  + keepdim=True) + floor
  ? tests/test_gates.py -k follow_the_formula

src/statemix/mixers/half_life.py
the powers of the decay begin at zero
  - torch.arange(1, order + 1, dtype=torch.float64)
  + torch.arange(order, dtype=torch.float64)
  ? tests/test_mixers_laws.py -k memory_halves

src/statemix/scan/reference.py
the loop mixes with the transposed block
  - (transition * state[:, None]).sum(2)
  + (transition * state[:, :, None]).sum(1)
  ? tests/test_scan.py -k by_hand
the loop takes the input gate for a lag
  - (weight[:, :-1] * lags).sum(1) + weight[:, -1] * value
  + (weight[:, 1:] * lags).sum(1) + weight[:, 0] * value
  ? tests/test_scan.py -k by_hand
the loop resets one step late
  - problem.reset[:, t, None, None]
  + problem.reset[:, t - 1, None, None]
  ? tests/test_scan.py -k loop_equals_numpy

src/statemix/scan/problem.py
weights are rounded to float32 before they are float64
  - normalize(raw_gates, self.normalization, dim=-2, dtype=dtype)
  + normalize(raw_gates, self.normalization, dim=-2).to(dtype)
  ? tests/test_scan_inputs.py -k almost_one_is_kept

src/statemix/scan/associative.py
maps are composed in the wrong order
  - _product(later, earlier, cut)
  + _product(earlier, later, cut)
  ? tests/test_scan.py -k equals_the_loop and associative
the last step of an odd length is the one before
  - torch.cat([pairs, even[:, -1:]], dim=1)
  + torch.cat([pairs, odd[:, -1:]], dim=1)
  ? tests/test_scan.py -k equals_the_loop and associative
a reset multiplies what is not finite by zero
  - left @ (right if reset is None else right.masked_fill(reset, 0))
  + left @ right
  ? tests/test_scan_inputs.py -k does_not_pass_a_reset

src/statemix/scan/__init__.py
lags of a short sequence forget the initial state's order
  - initial_state.to(states.dtype).flip(1)
  + initial_state.to(states.dtype)
  ? tests/test_scan.py -k lagged_states
a lag from the step of a reset is cut, too
  - age < last_reset[:, :, None]
  + age <= last_reset[:, :, None]
  ? tests/test_scan.py -k lagged_states

src/statemix/scan/cpu.py
the stride between sequences is that of dense values
  - value_batch_stride=values.stride(0)
  + value_batch_stride=values[0].numel()
  ? tests/test_scan.py -k expanded or equals_the_loop
gradients have the layout of an input that is not dense
  - raw_gates.new_empty(raw_gates.shape)
  + torch.empty_like(raw_gates)
  ? tests/test_scan.py -k equals_the_loop and cpu
the gradient of the final state is not passed on
  - call.grad_final_state = address(grad_final_state)
  + call.grad_final_state = None
  ? tests/test_mixers.py -k gradients_are_the_numerical_ones
a scan reads numbers whose sign is pending
  - x = x.resolve_neg()  #
  + x = x  #
  ? tests/test_scan_inputs.py -k negative_bit

src/statemix/kernels/operators.py
vmap gives every call the first of a batch
  - x.select(dim, i)
  + x.select(dim, 0)
  ? tests/test_layer_module.py -k vmap

src/statemix/kernels/layers.py
a layer keeps what is too large to be kept
  - gates > KEPT_BYTES
  + gates <= KEPT_BYTES
  ? tests/test_layer.py -k kept_bytes

src/statemix/kernels/steps.py
the two norms of a pair change places
  - mixer_norm=address(self.mixer_norm)
  + mixer_norm=address(self.mlp_norm)
  ? tests/test_step.py -k what_the_modules_do
the two epsilons of a pair change places
  - mixer_epsilon=self.mixer_epsilon
  + mixer_epsilon=self.mlp_epsilon
  ? tests/test_step.py -k epsilon

src/statemix/kernels/gating.py
the slope of silu has a wrong term in double backward
  - (1 + gate * (1 - share))
  + (1 + gate * share)
  ? tests/test_gated.py -k first_and_second

src/statemix/fused.py
a hook that comes after the first call is not seen
  - sizes=[*hooks, *_global_hooks,
  + sizes=[*_global_hooks,
  ? tests/test_generate.py -k sees_what_happens
a weight that moved in memory is not seen
  -             tensors=weights,
  +             tensors=(),
  ? tests/test_generate.py -k sees_what_happens

src/statemix/mixers/linear_recurrence.py
a step of one token sees all blocks where some are hidden
  - return _allowed_hidden(mixer) and not mixer.hidden
  + return _allowed_hidden(mixer)
  ? tests/test_layer_module.py -k hidden_blocks
a table stands in for a mix that was exchanged
  - or not ROWS.runs_its_own(self) or not ROWS.reads
  + or not ROWS.reads
  ? tests/test_fused.py -k only_where_calls
lags before the first step are zero where a state came
  - lagged_states(states, state, reset, self.state_shape[0])
  + lagged_states(states, None, reset, self.state_shape[0])
  ? tests/test_mixers.py -k split_at_every_point
a one-hot row has no gradient
  - return rows + (weights - weights.detach())
  + return rows
  ? tests/test_training_exact.py -k gradient_of_all
the state of blocks that are heard is put at the first ones
  - index_copy(2, self.heard, state)
  + index_copy(2, self.heard - self.heard.min(), state)
  ? tests/test_training_exact.py -k silenced_are_not_computed
the columns of a table of one-hot rows are taken for raw gates
  - normalization="none",
  + normalization=self.normalization,
  ? tests/test_training_exact.py -k one_hot_rows_of_few

src/statemix/mixers/attention.py
an attention may have a width that its rotation cannot halve
  -         return 2
  +         return 1
  ? tests/test_sizing.py

src/statemix/training/listeners.py
a tracker is told again what it has been told
  - if self._lines > self._given["lines"]:
  + if self._lines > len(self._earlier):
  ? tests/test_training_listeners.py -k no_line_twice

src/statemix/training/checkpoint.py
a checkpoint at the end of a shorter run is one of the longer run
  - if step <= part["step"]), steps)
  + if step < part["step"]), steps)
  ? tests/test_training_lineage.py -k schedule_changed
the pointer moves before its files are complete
  -         partial.rename(target)
  -         self.write_json(POINTER_FILE, pointer)
  +         self.write_json(POINTER_FILE, pointer)
  +         partial.rename(target)
  ? tests/test_training_checkpoint.py -k gets_its_name
a checkpoint is renamed before its files are on the disk
  -             sync(file)
  +             pass
  ? tests/test_training_checkpoint.py -k gets_its_name
the best checkpoint is deleted once it is not the last
  - set((self._pointer() or {}).values())
  + {(self._pointer() or {}).get("last")}
  ? tests/test_training_loop.py -k best_checkpoint
the pointer to the best moves when it should not
  - "best": name if best else pointer["best"]
  + "best": pointer["best"] if best else name
  ? tests/test_training_loop.py -k best_checkpoint
metrics after the checkpoint stay when a run resumes
  - path.read_bytes()[:size] if size else
  + path.read_bytes() if size else
  ? tests/test_training_loop.py -k goes_on_from

src/statemix/hf/models.py
a classifier reads the last position, be it padding
  - last = (real * torch.arange(1, steps + 1, device=real.device)).argmax(1)
  + pass
  ? tests/test_hf.py -k classified_by_its_last

src/statemix/training/loop.py
training goes on from the weights of the best checkpoint
  - for checkpoint in (best, last):
  + for checkpoint in (last, best):
  ? tests/test_training_loop.py tests/test_training_text.py tests/test_training_optimizer.py
  ? -k goes_on_from or resumed_run or resumes_exactly
the moments of the optimizer are not restored
  -             load_optimizer(self.optimizer, last)
  +             pass
  ? tests/test_training_loop.py -k goes_on_from
a resumed run begins a step too early
  - saved["step"], saved["best_loss"], step_of(best)
  + saved["step"] - 1, saved["best_loss"], step_of(best)
  ? tests/test_training_loop.py -k goes_on_from
a resumed run forgets its best loss
  - saved["step"], saved["best_loss"], step_of(best)
  + saved["step"], math.inf, step_of(best)
  ? tests/test_training_loop.py tests/test_training_text.py tests/test_training_optimizer.py
  ? -k goes_on_from or resumed_run or resumes_exactly
a resumed run does not count the steps since its best
  - saved["step"], saved["best_loss"], step_of(best)
  + saved["step"], saved["best_loss"], saved["step"]
  ? tests/test_training_ends.py -k patience
gradients of earlier steps stay
  -         self.optimizer.zero_grad()
  ? tests/test_training_loop.py -k goes_on_from
the learning rate is that of the next step
  - learning_rate(config.optimizer, self.step, config.steps)
  + learning_rate(config.optimizer, self.step + 1, config.steps)
  ? tests/test_training_loop.py -k metrics_have
the rows of parts are not those of the carried states
  - tuple(layer[rows] for layer in self.carried)
  + tuple(layer[: rows.stop - rows.start] for layer in self.carried)
  ? tests/test_training_text.py -k goes_on_where

src/statemix/training/regularization.py
the noise of gates stays on the weights
  -                 weight.copy_(own)
  +                 own.copy_(weight)
  ? tests/test_training_regularization.py -k noise_is_on
the noise of gates is the same at each step
  - manual_seed(hash((seed, step)))
  + manual_seed(hash((seed, 0)))
  ? tests/test_training_regularization.py -k noise_is_on
what is dropped depends on the caller's random state
  -             seed(hash((config.seed, step, process)))
  +             pass
  ? tests/test_training_regularization.py -k dropped_is_of
every step drops the same
  - hash((config.seed, step, process))
  + hash((config.seed, process))
  ? tests/test_training_regularization.py -k dropped_is_of
rows are not one-hot after pruning
  - curriculum.silenced, config
  + None, config
  ? tests/test_training_curriculum.py -k one_hot

src/statemix/training/evaluate.py
validation drops as training does
  -     model.eval()
  ? tests/test_training_loop.py -k drops_nothing

src/statemix/training/optimizer.py
the first step of the warm-up has a rate of zero
  - config.lr * (step + 1) / warmup
  + config.lr * step / warmup
  ? tests/test_training_loop.py -k learning_rate
the schedule ends one step late
  - max(1, steps - 1 - warmup)
  + max(1, steps - warmup)
  ? tests/test_training_loop.py -k learning_rate
biases decay
  - "weight_decay": 0.0
  + "weight_decay": config.weight_decay
  ? tests/test_training_loop.py -k weight_decay
Muon's matrices have the rate of the others
  - rate * group["lr_share"]
  + rate
  ? tests/test_training_optimizer.py -k share_of_the_rate
the largest second moment is not kept
  - amsgrad=config.amsgrad
  + amsgrad=False
  ? tests/test_training_optimizer.py -k after_a_rest

csrc/recurrence.h
the kernel mixes with the transposed block
  -           const V<T> q = weight(i * gates + j);
  -           const Mask<T> flagged = flags(q);
  -           rest[0] =
  +           const V<T> q = weight((kind == kBlock ? j : 0) * gates + (kind == kBlock ? i : j));
  +           const Mask<T> flagged = flags(q);
  +           rest[0] =
  ? tests/test_golden.py -k published_ones
the kernel resets one step early
  - if (steps.reset && steps.reset[t])
  + if (steps.reset && t + 1 < steps.count && steps.reset[t + 1])
  ? tests/test_cpu.py -k each_instruction_set_equals
what rounding lost is lost at the end of a chunk
  - carry[i] = h[i], carry[order + i] = lost[i];
  + carry[i] = h[i], carry[order + i] = V<T>{};
  ? tests/test_cpu.py -k length_of_a_chunk
the gradient of a gate lacks the derivative of the sum that normalises it
  - sp * (ug - mean)
  + sp * ug
  ? tests/test_cpu.py -k each_instruction_set_equals
the adjoint passes a reset
  - const bool cut = t == first;
  + const bool cut = false;
  ? tests/test_cpu.py -k each_instruction_set_equals
a lag of the step of a reset is cut in the backward
  - first >= 0 && made < first
  + first >= 0 && made <= first
  ? tests/test_cpu.py -k each_instruction_set_equals
the floor of relu is missing beside a weight above a half
  - V<T> others[2] = {floor, {}};
  + V<T> others[2] = {{}, {}};
  ? tests/test_cpu.py -k each_instruction_set_equals

csrc/scans.h
the last block of a part of a vector is not written
  - for (int l = 0; l < o.lanes; ++l) ((T*)to)[at + l] = from[l];
  + for (int l = 0; l + 1 < o.lanes; ++l) ((T*)to)[at + l] = from[l];
  ? tests/test_cpu.py -k each_instruction_set_equals
a chunk begins with the initial state, not with the carry
  - if (turn == 0) {
  + if (turn >= 0) {
  ? tests/test_cpu.py -k length_of_a_chunk
bfloat16 is cut, not rounded
  - (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
  + bits >> 16
  ? tests/test_scan.py -k equals_the_loop and cpu and bfloat16

csrc/threads.h
what does not divide by the threads is left out
  - return count * i / threads;
  + return count / threads * i;
  ? tests/test_layer.py tests/test_step.py -k threads

csrc/layer.h
the gradient of states is not told what the read-out sees
  -     if (p.visibility) show(b, count, s.kept, to, s.kept, to);
  ? tests/test_layer.py -k read_out_does_not_see
the gradients of a table's rows are added up in the order of the steps
  - grads + steps.row(t) * s.columns
  + grads + t % s.table * s.columns
  ? tests/test_layer.py -k table_of_rows_equals
kept gates are used that were not kept
  -     if (!p.kept && !s.table) project(x_rows, count, gates, s.pitch);
  ? tests/test_layer.py -k however_much_it_keeps
kept weights are taken for gates once more
  - if (!s.table && (!in_place || !p.kept)) recur.weigh_to_return
  + if (!s.table) recur.weigh_to_return
  ? tests/test_layer.py -k however_much_it_keeps
the final state is that of the first chunk
  - if (turn == chunks - 1) write_state(carry, b, v, p.final_state);
  + if (turn == 0) write_state(carry, b, v, p.final_state);
  ? tests/test_layer.py -k however_much_it_keeps
the initial lags are read out in the wrong order
  - states(b, -1 - i) + at :
  + states(b, i - s.order) + at :
  ? tests/test_layer.py -k however_much_it_keeps
the read-out's part of the initial state's gradient is missing
  - carry[i] += load(grad_states
  + carry[i] += T(0) * load(grad_states
  ? tests/test_layer.py -k however_much_it_keeps
the bias gradient is missing
  - total += load(gates + i * s.pitch + c);
  + total += T(0) * load(gates + i * s.pitch + c);
  ? tests/test_layer.py -k however_much_it_keeps
the last thread's sums are missing
  - for (int64_t i = 1; i < threads; ++i) sum +=
  + for (int64_t i = 1; i < threads - 1; ++i) sum +=
  ? tests/test_layer.py -k however_much_it_keeps
the companion's gradient sees the next sequence
  - const bool inside = t >= 0 && t < s.length;
  + const bool inside = t >= 0 && (t < s.length || b + 1 < s.batch);
  ? tests/test_layer.py -k however_much_it_keeps

csrc/step.h
a step leaves out the numbers beyond the last whole vector
  - if (const int left = int(p.width - d)) add(
  + if (const int left = int(p.width - d); left < 0) add(
  ? tests/test_step.py -k what_the_modules_do
every thread reads the first row's state
  - scan.initial_state = (const char*)p.initial_state + at,
  + scan.initial_state = (const char*)p.initial_state,
  ? tests/test_layer.py tests/test_step.py -k alone or what_the_modules_do
a step's norm has no epsilon
  - std::sqrt(sum / T(width) + T(epsilon))
  + std::sqrt(sum / T(width))
  ? tests/test_step.py -k what_the_modules_do or what_the_modules_make
the SwiGLU of a step is a GLU
  - gates * Sigmoid<T>(gates).value
  + Sigmoid<T>(gates).value
  ? tests/test_step.py -k what_the_modules_do

src/statemix/search.py
two states of the model whose first layers agree are one
  - torch.cat([part.flatten(1) for part in parts], dim=1)
  + torch.cat([(part if i == 0 else 0 * part).flatten(1) for i, part in enumerate(parts)], dim=1)
  ? tests/test_verify.py -k all_layers
only components whose every weight is there are read
  - != 0).any(0)
  + != 0).all(0)
  ? tests/test_verify.py -k never_read or all_layers
what a live component is made of is left out
  - more := live | (self._copied[layer] & live[:, None]).any(0)
  + more := live
  ? tests/test_verify.py -k depends_on
a row that may copy is one that does
  - - self._zero - ROUNDING
  + - ROUNDING
  ? tests/test_verify.py -k what_a_row
a model is right where the task does not score
  - target not in (NONE, said)
  + target != said
  ? tests/test_verify.py -k does_not_score
the first wrong word is of the last transition met
  - if self.wrong is None and target
  + if target
  ? tests/test_verify.py -k shortest_word
a search that was cut short says equal
  - if search.pending or len(search.pairs) > max_states:
  + if False:
  ? tests/test_verify.py -k more_states

src/statemix/backbone.py
a table of gates goes round a hook of the mixer
  - plain and fused.unchanged_by_hooks(self.mixer) and self
  + plain and self
  ? tests/test_model.py -k between
logits where they are wanted are those of the first steps
  - x = x[where][None]
  + x = x.flatten(0, 1)[: int(where.sum())][None]
  ? tests/test_model.py -k wanted

src/statemix/model.py
a table of gates goes round a subclass's embedding
  - or type(self)._embedded is not TokenModel._embedded:
  + :
  ? tests/test_model.py -k does_not_serve

src/statemix/training/pruning.py
the first columns are pruned first
  - key=lambda columns: -_count(states[:, columns])
  + key=lambda columns: columns
  ? tests/test_training_curriculum.py -k pruning_takes_away
a part that comes back finds the weights of the trial
  -         restore(model, optimizer, self.before)
  ? tests/test_training_curriculum.py -k come_back
rows become one-hot where they err
  -         if not errors(tried, batches):
  +         if True:
  ? tests/test_training_curriculum.py -k stay_soft
what came back with others is never tried alone
  -         if len(pieces) > 1:
  -             return
  -         self.staying
  +         self.staying
  ? tests/test_training_curriculum.py -k goes_along

src/statemix/training/curriculum.py
only the last word that was given comes again
  - dict.fromkeys(self.given, 0)
  + dict.fromkeys(self.given[-1:], 0)
  ? tests/test_training_curriculum.py -k comes_again_until

src/statemix/analysis/automata.py
states are one as soon as their outputs are
  - kinds = _kinds(np.column_stack([kinds, after]))
  + break
  ? tests/test_automata.py -k least_one or alike

src/statemix/explore/model.js
the page takes the observer form for the companion form
  - kind === "observer" ? j * order
  + kind === "companion" ? j * order
  ? tests/test_explore.py -k the_script_computes

src/statemix/explore/page.js
the page says what an automaton says in the state before
  - automaton.outputs[before][token]
  + automaton.outputs[states.at(-3) ?? before][token]
  ? tests/test_explore.py -k a_browser

src/statemix/explore/__init__.py
the page shows another model than was verified
  - sharpen = verdict.sharpened
  + sharpen = None
  ? tests/test_explore.py -k the_automaton_is
"""


def read_faults(table: str) -> Iterator[Fault]:
    """The faults of a table. Of an entry the lines with the same mark are one text."""
    for paragraph in table.strip().split("\n\n"):
        file, *entries = re.split(r"\n(?! )", paragraph)
        for entry in entries:
            name, *lines = entry.split("\n")
            assert all(re.match("  [-+?] ", line) for line in lines), entry
            old, new, asked = ("\n".join(line[4:] for line in lines if line[2] == mark) for mark in "-+?")
            tests, _, select = asked.replace("\n", " ").partition(" -k ")
            yield Fault(name, file, old, new, tests, select)


FAULTS = tuple(read_faults(TABLE))
