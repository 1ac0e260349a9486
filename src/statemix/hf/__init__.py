"""SequenceModel as models of Hugging Face's transformers, the extra `hf`: importing this registers them.

    import statemix.hf
    model = statemix.hf.StatemixForCausalLM.from_statemix("runs/shakespeare")
    model.save_pretrained("folder")                  # AutoModelForCausalLM.from_pretrained("folder") reads it
    model.generate(...), pipeline("text-generation", model, tokenizer=...), Trainer(model, ...)
    AutoModelForSequenceClassification.from_pretrained("folder", num_labels=3), AutoModel.from_pretrained("folder")

The cache of `generate` is the recurrent state: of constant size, reordered for beams. Padding, wherever it stands,
leaves the state as it is, so that a row of a batch gives what it gives alone. transformers hands the cache over as
`past_key_values`, and from 5.24 on as `cache`: both names are served, and a keyword that is not known is refused.
"""

from statemix.hf.reading import StateCache

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from statemix.hf.models import (
        CACHE_NAME,
        Reading,
        StatemixConfig,
        StatemixForCausalLM,
        StatemixForSequenceClassification,
        StatemixModel,
        StatemixPreTrainedModel,
    )
    from statemix.hf.tokenizer import PAD_BYTE, PAD_TOKEN, hf_tokenizer
except ImportError as error:
    raise ImportError("statemix.hf: it needs transformers 5 or newer: pip install 'statemix[hf]'.") from error

__all__ = [
    "CACHE_NAME",
    "LORA_TARGETS",
    "PAD_BYTE",
    "PAD_TOKEN",
    "Reading",
    "StateCache",
    "StatemixConfig",
    "StatemixForCausalLM",
    "StatemixForSequenceClassification",
    "StatemixModel",
    "StatemixPreTrainedModel",
    "hf_tokenizer",
]

# What PEFT's LoraConfig adapts unless it names others: the maps into each mixer and out of it, the one that makes gates
# among them, and those of each SwiGLU. target_modules="all-linear" also adapts the few small maps of other names.
LORA_TARGETS = ["gate_and_input", "inputs", "output", "projection", "values"]

AutoConfig.register(StatemixConfig.model_type, StatemixConfig)
StatemixConfig.register_for_auto_class()
for auto, model in (
    (AutoModel, StatemixModel),
    (AutoModelForCausalLM, StatemixForCausalLM),
    (AutoModelForSequenceClassification, StatemixForSequenceClassification),
):
    auto.register(StatemixConfig, model)
    model.register_for_auto_class(auto.__name__)
try:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
except ImportError:
    pass
else:
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[StatemixConfig.model_type] = LORA_TARGETS
