"""A tokenizer for the tiny models, whose vocabulary of 128 is just enough for ASCII: one token a character."""

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

ASCII = 128
UNKNOWN = "?"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Token ids are ASCII codes; what is not ASCII becomes a question mark. Without a chat template."""
    characters = Tokenizer(WordLevel({chr(code): code for code in range(ASCII)}, unk_token=UNKNOWN))
    characters.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = Fuse()
    # The tiny models' configurations call 0, 1 and 2 padding, beginning and end.
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=chr(0),
        bos_token=chr(1),
        eos_token=chr(2),
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
