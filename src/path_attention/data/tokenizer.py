"""Tokenizers: one from a folder or the Hub, or a byte-level BPE trained on the documents themselves."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# The name that stands in a recipe for one that is trained.
BPE = "bpe"
END_OF_TEXT = "<|endoftext|>"
# Every byte and the end of text.
SMALLEST_VOCABULARY = 257


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE of GPT-2's kind, as a transformers tokenizer: it spells every text, and END_OF_TEXT is its one
    special token.

    Fewer tokens than asked for where the texts have not so many pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def load_tokenizer(name: str, key: str = "data.tokenizer") -> Any:
    """A transformers tokenizer.

    Args:
        name: a folder, or a name on the Hub.
        key: what error messages call it.

    Raises:
        ValueError: there is none, or it has no token that could stand between documents.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: no tokenizer {name!r}: {' '.join(str(error).split())}") from error
    separator(tokenizer, key)
    return tokenizer


def separator(tokenizer: Any, key: str = "data.tokenizer") -> int:
    """The token before every document: the tokenizer's token for the beginning, or else for the end of a text.

    Raises:
        ValueError: it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(f"{key}: wanted a tokenizer with a bos or eos token to stand between documents, got neither")


class Encoder:
    """Texts to token ids, many at once: a fast tokenizer shares them among all cores.

    What looks like a special token in a text is text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.slow: Any = None
        self.size = len(tokenizer)
        self.dtype = np.dtype(np.uint16 if self.size <= 2**16 else np.uint32)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            self.slow = tokenizer
            self.identity = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
            return
        from tokenizers import Tokenizer

        text = backend.to_str()
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.fast = Tokenizer.from_str(text)  # a copy: whoever gave us the tokenizer keeps his settings
        self.fast.no_padding()
        self.fast.no_truncation()
        self.fast.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The tokens of each text, without special ones around them."""
        if self.slow is not None:
            found = [self.slow.encode(text, add_special_tokens=False) for text in texts]
        else:
            found = [e.ids for e in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [np.array(ids, dtype=self.dtype) for ids in found]
