"""The table of docs/export.md: every mixer in every format, and how far its results are from the model's own.

python experiments/exports.py                 # minutes
python experiments/exports.py bd_lru h_lru
"""

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from statemix import SequenceModel
from statemix.export import export_onnx, export_program, program_names
from statemix.report.tables import align

SPECS: dict[str, dict[str, object]] = {
    "bd_lru": {"name": "bd_lru", "num_blocks": 5, "block_size": 3},
    "h_lru": {"name": "h_lru", "num_channels": 5, "order": 3},
    "h_lru, observer": {"name": "h_lru", "num_channels": 5, "order": 3, "form": "observer"},
    "lru": {"name": "lru", "num_channels": 5},
    "gru": {"name": "gru", "hidden_size": 7},
    "lstm": {"name": "lstm", "hidden_size": 7},
    "mlstm": {"name": "mlstm", "head_dim": 6, "num_heads": 2},
    "mamba2": {"name": "mamba2", "head_dim": 3, "state_dim": 5},
    "delta_net": {"name": "delta_net", "head_dim": 8, "num_heads": 2},
    "gated_delta_net": {"name": "gated_delta_net", "head_dim": 3, "num_heads": 2},
    "delta_product": {"name": "delta_product", "head_dim": 8, "num_heads": 2, "rank": 3},
    "pd_ssm": {"name": "pd_ssm", "num_channels": 5, "dictionary_size": 3},
    "attention": {"name": "attention", "head_dim": 4, "num_heads": 2, "context": 5},
}
LENGTHS = (1, 7, 1000)
VOCABULARY, WIDTH = 11, 12
Program = Callable[[Tensor, tuple[Tensor, ...]], list[Tensor]]


def loaded_program(model: SequenceModel, step: bool) -> Program:
    """Saved, read again, and as a function of tokens and state to all results."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        torch.export.save(export_program(model, step=step), path)
        module = torch.export.load(path).module()

    def run(tokens: Tensor, state: tuple[Tensor, ...]) -> list[Tensor]:
        logits, after = module(tokens, state)
        return [logits, *after]

    return run


def loaded_onnx(model: SequenceModel, step: bool) -> Program:
    """In onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(export_onnx(model, step=step).SerializeToString(), options)
    names = program_names(model, step=step).inputs

    def run(tokens: Tensor, state: tuple[Tensor, ...]) -> list[Tensor]:
        inputs = zip(names, (tokens, *state), strict=True)
        return [torch.from_numpy(y) for y in session.run(None, {name: x.numpy() for name, x in inputs})]

    return run


@torch.no_grad()
def largest_error(model: SequenceModel, run: Program, step: bool) -> float:
    """The largest difference from the model's logits and states, over the largest entry of each, at all lengths.

    It begins from a state that is not zero: what the model has after three tokens.
    """
    generator, errors = torch.Generator().manual_seed(0), []
    for rows in (1, 3):
        for length in (1,) if step else LENGTHS:
            tokens = torch.randint(VOCABULARY, (rows, 3 + length), generator=generator)
            _, state = model(tokens[:, :3])
            logits, after = model(tokens[:, 3:], state)
            results = run(tokens[:, 3] if step else tokens[:, 3:], state)
            wanted = [logits[:, 0] if step else logits, *after]
            errors += [((y - w).abs().max() / w.abs().max()).item() for y, w in zip(results, wanted, strict=True)]
    return max(errors)


FORMATS = {
    "pt2, sequence": (loaded_program, False),
    "pt2, step": (loaded_program, True),
    "onnx, sequence": (loaded_onnx, False),
    "onnx, step": (loaded_onnx, True),
}


def table(names: Sequence[str]) -> list[list[str]]:
    """A row of each mixer: the largest error in each format, or a dash where it cannot be exported."""
    rows = [["mixer", *FORMATS]]
    for name in names:
        torch.manual_seed(0)
        model = SequenceModel(VOCABULARY, WIDTH, 2, SPECS[name]).eval()
        row = [name]
        for load, step in FORMATS.values():
            try:
                row.append(f"{largest_error(model, load(model, step), step):.0e}")
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr)
                row.append("-")
        rows.append(row)
    return rows


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # torch's, of what it does not find installed
    warnings.simplefilter("ignore")
    print(align(table(sys.argv[1:] or list(SPECS)), markdown=True))
