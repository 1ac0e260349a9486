"""Our tokenizers as those of transformers."""

import tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from statemix.text.tokenizer import BPE, Characters, Tokenizer

PAD_BYTE, PAD_TOKEN = 255, "<|pad|>"


def hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokens as a tokenizer of transformers.

    That of bytes has `<|pad|>` for padding: the byte 255, which is in no UTF-8 text. Only where a text has these
    letters themselves, transformers takes them for it. The others have no token to spare: with an attention mask any
    will do, such as `pad_token_id=0` for `generate`.
    """
    special = {}
    if isinstance(tokenizer, BPE):
        inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    elif isinstance(tokenizer, Characters):
        places = {character: place for place, character in enumerate(tokenizer.alphabet)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(places))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        inner.decoder = tokenizers.decoders.Fuse()
    else:
        # a byte goes by its own character if that is printable, or else by the next from U+0100
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        others = (character for character in alphabet if ord(character) > 255)
        places = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
        places = {PAD_TOKEN if byte == PAD_BYTE else name: byte for name, byte in places.items()}
        special["pad_token"] = AddedToken(PAD_TOKEN, special=True, normalized=False)
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(places, []))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
